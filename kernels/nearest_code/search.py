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
    autocast and without gradients. Raises ValueError for an invalid codebook; UsageError for an
    unknown name; EnvironmentProblem, with the reason, for a named back end that is not available
    here. `auto` logs its choice once for each codebook's shape.

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
        self.backend, self._module, self._state = self._prepare(backend)
        self.num_nonfinite = torch.zeros((), dtype=torch.int64, device=codebook.device)
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
            return backend, module, module.prepare(self.codebook)
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
            _say_once(
                f"codebook search: {name} for {where[1]} codes of {where[2]} dimensions on {where[0].type}"
            )
            log.debug("codebook search: not %s", "; ".join(reasons))
            return name, module, state
        raise AssertionError("torch is always available")

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
        if self.backend == "triton":  # writes z_q as it goes
            self._module.search(latents, self._state, codes, num_nonfinite, quantized)
            return codes
        self._module.search(latents, self._state, codes, num_nonfinite)
        if quantized is not None:
            torch.index_select(self.codebook, 0, codes, out=quantized)
        return codes

    def __reduce__(self) -> tuple[Any, ...]:  # copies and other processes prepare their own
        return CodebookSearch, (self.codebook, self.requested)


_said: set[str] = set()


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        log.info(line)


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
