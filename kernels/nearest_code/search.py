"""`CodebookSearch`: the exact search of a codebook that does not change, prepared once."""

from __future__ import annotations

import importlib
import itertools
import logging
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dad_fast.errors import EnvironmentProblem, UsageError

log = logging.getLogger(__name__)

# Name -> modules, the first that is available; each has available(), prepare() and search().
BACK_ENDS = {
    "grid": ("grid_search",),
    "csrc": ("csrc_search",),
    "cuda": ("cuda_search",),
    "triton": ("triton_small", "triton_gemm"),
    "torch": ("torch_search",),
}
# A grid is built in milliseconds for 64 codes, but reading so few one by one is as fast.
MIN_GRID_CODES = 128
# Latents of the search that tests a back end before its first use.
NUM_TESTED = 32

_handles = itertools.count()
_searches: weakref.WeakValueDictionary[int, CodebookSearch] = weakref.WeakValueDictionary()


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"dad_fast.kernels.nearest_code.{name}")


def _find(
    name: str, device: torch.device, num_codes: int, dim: int
) -> tuple[ModuleType | None, str]:
    """Return the back end's module, or None and the reason."""
    reason = ""
    for file in BACK_ENDS[name]:
        try:
            module = _module(file)
        except ImportError as error:  # triton is not installed
            return None, str(error)
        reason = module.available(device, num_codes, dim)
        if not reason:
            return module, ""
    return None, reason


class CodebookSearch:
    """Exact nearest-code search for one codebook; ready when the constructor returns.

    codebook: [K, D], K >= 1, D >= 1, float32, float16 or bfloat16, on any device;
              copied, so later changes have no effect
    backend: `auto`, or by name
      `grid`    CPU, D <= 4: a grid whose cells list the codes that can win; built once, kept in the
                user's cache folder
      `csrc`    CPU: all codes in blocks, fp32 then fp64
      `cuda`    CUDA, D <= 4: the same grid, one launch
      `triton`  CUDA: tensor cores, then fp64 for close cases
      `torch`   any device
    Every back end gives the codes of the fp64 search (see this package's docstring), outside
    autocast and without gradients. A back end is used only if it finds the codes of `torch` for a
    few latents here: a library may be compiled for another GPU or a newer driver. Raises
    ValueError for an invalid codebook; UsageError for an unknown name; EnvironmentProblem, with the
    reason, for a named back end that is not available here or fails this test. `auto` takes the
    next one, and logs its choice once for each codebook's shape, and each failure once.

    `num_nonfinite`, an int64 tensor on the codebook's device, counts the non-finite latents (code
    0) over all searches. No search synchronises with the host except `torch` with D > 16; both
    methods compile as one graph.
    """

    def __init__(self, codebook: Tensor, backend: str = "auto") -> None:
        if (
            codebook.ndim != 2
            or 0 in codebook.shape
            or codebook.dtype not in (torch.float32, torch.float16, torch.bfloat16)
        ):
            raise ValueError(
                f"a codebook [K, D] in float32, float16 or bfloat16 is needed, not {list(codebook.shape)} in {codebook.dtype}"
            )
        self.codebook = codebook.detach().to(torch.float32, copy=True).contiguous()
        self.requested = backend
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=codebook.device)
        self.backend, self._module, self._state = self._prepare(backend)
        self._handle = next(_handles)
        _searches[self._handle] = self

    def _prepare(self, backend: str) -> tuple[str, ModuleType, Any]:
        where = (self.codebook.device, *self.codebook.shape)
        if backend != "auto":
            if backend not in BACK_ENDS:
                raise UsageError(
                    f"codebook search: no back end {backend!r}; choose one of auto, {', '.join(BACK_ENDS)}"
                )
            module, reason = _find(backend, *where)
            if module is None:
                raise EnvironmentProblem(
                    f"codebook search: the back end {backend} was asked for, but {reason}"
                )
            state = module.prepare(self.codebook)
            if problem := self._problem(backend, module, state):
                raise EnvironmentProblem(
                    f"codebook search: the back end {backend} was asked for, but {problem}"
                )
            return backend, module, state
        reasons = []
        for name in BACK_ENDS:
            if name in ("grid", "cuda") and len(self.codebook) < MIN_GRID_CODES:
                continue
            module, reason = _find(name, *where)
            if module is None:
                reasons.append(f"{name}: {reason}")
                continue
            try:
                state = module.prepare(self.codebook)
            except UsageError as error:  # this codebook has no grid
                reasons.append(f"{name}: {error}")
                continue
            if problem := self._problem(name, module, state):
                _log_once(logging.WARNING, f"codebook search: not {name}: {problem}")
                continue
            _log_once(
                logging.INFO,
                f"codebook search: {name} for {where[1]} codes of {where[2]} dimensions "
                f"on {where[0].type}",
            )
            log.debug("codebook search: not %s", "; ".join(reasons))
            return name, module, state
        raise AssertionError("torch is always available")

    @torch.no_grad()
    def _problem(self, name: str, module: ModuleType, state: Any) -> str:
        """Return why the back end fails here: its error, or codes unlike those of `torch`; else ""."""
        if name == "torch":
            return ""
        codebook = self.codebook
        picked = torch.arange(NUM_TESTED, device=codebook.device) * 7919 % len(codebook)
        # Between codes, and one that is not finite.
        latents = codebook[picked].lerp(codebook[picked.flip(0)], 0.4)
        latents[-1] = torch.nan
        found, expected = (torch.full_like(picked, -1) for _ in range(2))
        counts = torch.zeros_like(picked[:2])
        try:
            _run(name, module, state, latents, found, counts[0])
            _run("torch", _module("torch_search"), codebook, latents, expected, counts[1])
            # Not farther is enough: where a processor flushes tiny numbers to zero, ties differ.
            is_farther = ~(self._distance(latents, found) <= self._distance(latents, expected))
            num_wrong = int((is_farther & (found != expected)).sum())
            count, expected_count = counts.tolist()
        # A launch that the driver refuses, or whatever else a compiled library raises.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            return f"it fails here ({reason})"
        if num_wrong:
            return f"it gives {num_wrong} wrong codes of {NUM_TESTED} here"
        return (
            "" if count == expected_count else "it counts latents that are not finite wrongly here"
        )

    def _distance(self, latents: Tensor, codes: Tensor) -> Tensor:
        """Return squared distances [N] float64; infinite for numbers that are no code."""
        num_codes = len(self.codebook)
        entries = self.codebook[codes.clamp(0, num_codes - 1)].double()
        distance = (latents.double() - entries).square().sum(1)
        return distance.where((codes >= 0) & (codes < num_codes), torch.inf)

    def search(self, latents: Tensor) -> Tensor:
        """Return codes int64 [N] or [B, H, W] of `latents` [N, D] or [B, D, H, W], float32, float16
        or bfloat16, any strides.

        The lowest index wins a tie; a non-finite latent gets code 0 and counts in `num_nonfinite`.
        Raises ValueError for other inputs.
        """
        flat, shape = self._flatten(latents)
        return torch.ops.dad_fast.codebook_search(flat, self.num_nonfinite, self._handle).view(
            shape
        )

    def search_and_quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Like `search`, and also return the codes' entries of the codebook: float32, shaped as
        `latents`.
        """
        flat, shape = self._flatten(latents)
        codes, quantized = torch.ops.dad_fast.codebook_search_and_quantize(
            flat, self.num_nonfinite, self._handle
        )
        if latents.ndim == 4:
            quantized = quantized.view(*shape, -1).permute(0, 3, 1, 2)
        return codes.view(shape), quantized

    def _flatten(self, latents: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return latents as [N, D] float32, contiguous, and the codes' shape."""
        dim = self.codebook.shape[1]
        if (
            latents.ndim not in (2, 4)
            or latents.shape[1] != dim
            or latents.device != self.codebook.device
        ):
            raise ValueError(
                f"latents [N, {dim}] or [B, {dim}, H, W] on {self.codebook.device} are needed, "
                f"not {list(latents.shape)} on {latents.device}"
            )
        if latents.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"latents must be float32, float16 or bfloat16, not {latents.dtype}")
        latents = latents.detach()
        if latents.ndim == 2:
            return latents.float().contiguous(), (latents.shape[0],)
        batch, _, height, width = latents.shape
        return latents.permute(0, 2, 3, 1).reshape(-1, dim).float().contiguous(), (
            batch,
            height,
            width,
        )

    def run(self, latents: Tensor, num_nonfinite: Tensor, quantized: Tensor | None) -> Tensor:
        """Search latents [N, D] float32, contiguous; called by the ops below."""
        codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        is_written = _run(
            self.backend, self._module, self._state, latents, codes, num_nonfinite, quantized
        )
        if quantized is not None and not is_written:
            torch.index_select(self.codebook, 0, codes, out=quantized)
        return codes

    def __reduce__(self) -> tuple[Any, ...]:  # copies and other processes prepare their own
        return CodebookSearch, (self.codebook, self.requested)


def _run(
    name: str,
    module: ModuleType,
    state: Any,
    latents: Tensor,
    codes: Tensor,
    num_nonfinite: Tensor,
    quantized: Tensor | None = None,
) -> bool:
    """Search by a back end. Returns True if it also wrote `quantized`."""
    if name == "triton":
        module.search(latents, state, codes, num_nonfinite, quantized)
        return True
    module.search(latents, state, codes, num_nonfinite)
    return False


def problem(backend: str, device: str) -> str:
    """Return why a back end cannot search a small codebook on `device`; "" if it can."""
    codebook = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        CodebookSearch(codebook, backend)
    except EnvironmentProblem as error:
        return str(error).partition("was asked for, but ")[2]
    return ""


_logged: set[str] = set()


def _log_once(level: int, line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        log.log(level, line)


@torch.library.custom_op("dad_fast::codebook_search", mutates_args=("num_nonfinite",))
def _search(latents: Tensor, num_nonfinite: Tensor, handle: int) -> Tensor:
    return _searches[handle].run(latents, num_nonfinite, None)


@_search.register_fake
def _(latents: Tensor, num_nonfinite: Tensor, handle: int) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


@torch.library.custom_op("dad_fast::codebook_search_and_quantize", mutates_args=("num_nonfinite",))
def _search_and_quantize(
    latents: Tensor, num_nonfinite: Tensor, handle: int
) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(latents)
    return _searches[handle].run(latents, num_nonfinite, quantized), quantized


@_search_and_quantize.register_fake
def _(latents: Tensor, num_nonfinite: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    return latents.new_empty(latents.shape[0], dtype=torch.int64), torch.empty_like(latents)
