"""The step as CUDA graphs: gradients (with generation) and updates, captured once and replayed.

The first steps run plainly, on a side stream: they are real steps, and they warm up what may not
happen during a capture (cuBLAS, autotuning, compilation, the optimizer's state). Then each graph is
captured, which runs nothing, and replayed from there on. The graphs share one memory pool and
replay in the order of their capture; between them stands the eager work of a step (copying the
batch in, learning rates, and the all-reduce of several processes). The batch's tensors, the
gradients and every output keep their addresses. Random numbers stay right: a graph replays with the
device generator's state of that moment. Not yet run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.generator import StepInputs
from dad_fast.engine.update import Update
from dad_fast.errors import EnvironmentProblem
from dad_fast.loggers.profiling import stage

log = logging.getLogger("dad_fast.engine")

WARM_UP = 3  # plain steps before the capture
Generate = Callable[[Batch], StepInputs]
Learn = Callable[[Batch, StepInputs], list[dict[str, Tensor]]]


class StepGraphs:
    """Replays `learn` and `apply` for `TrainStep`.

    Where a capture fails they stay plain calls, with one warning, unless `required`: then
    EnvironmentProblem.
    """

    def __init__(
        self,
        device: torch.device,
        generate: Generate,
        learn: Learn,
        updates: Sequence[Update],
        required: bool,
    ) -> None:
        self._device = device
        self._generate = generate
        self._learn = learn
        self._updates = updates
        self._required = required
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps = 0  # updates made so far
        self._inputs: Batch | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []  # learn, apply
        self._scalars: list[dict[str, Tensor]] = []
        self._applied: list[Tensor] = []
        self.failed = False

    @classmethod
    def if_wanted(
        cls,
        wanted: str,
        device: torch.device,
        generate: Generate,
        learn: Learn,
        updates: Sequence[Update],
    ) -> StepGraphs | None:
        """Return graphs where they are wanted and possible, else None.

        wanted: "auto" (where possible), "on" or "off". Raises EnvironmentProblem for "on" on a CPU
        or with an optimizer that forbids it.
        """
        if wanted == "on" and device.type != "cuda":
            raise EnvironmentProblem(
                f"--cuda-graphs on: the run is on {device}; CUDA graphs need a CUDA device "
                "(auto does without)"
            )
        if wanted == "off" or device.type != "cuda":
            return None
        for update in updates:
            if update.capturable:
                continue
            name = type(update.optimizer).__name__
            reason = f"{name} takes its learning rate from the host, which a graph would freeze"
            if wanted == "on":
                raise EnvironmentProblem(
                    f"--cuda-graphs on: {reason}; use --opt adamw, adam or sgd, or "
                    "--cuda-graphs auto"
                )
            log.warning(
                "CUDA graphs are off: %s; every step also waits for the GPU, to read whether its "
                "gradients are finite (--opt adamw, adam or sgd does neither)",
                reason,
            )
            return None
        return cls(device, generate, learn, updates, required=wanted == "on")

    @property
    def captured(self) -> bool:
        return bool(self._graphs)

    def learn(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Generate from a micro-batch on the device and add the gradients of every learner.

        Returns each learner's scalars, which the next call overwrites.
        """
        if not self._graphs and not self.failed and self._steps >= WARM_UP:
            self._capture(batch)
        if not self._graphs:
            with self._aside():
                return self._learn(batch, self._generate(batch))
        assert self._inputs is not None
        for name, static in _tensors(self._inputs).items():
            static.copy_(getattr(batch, name))
        with stage("learn"):
            self._graphs[0].replay()
        return self._scalars

    def apply(self) -> list[Tensor]:
        """Make every learner's optimizer step. Returns whether each was applied."""
        self._steps += 1
        if self._graphs:
            self._graphs[1].replay()
            return self._applied
        with self._aside():
            applied = [update.apply() for update in self._updates]
        if self._steps == WARM_UP:
            # The capture comes with the next step: by then the gradients must stay where they are.
            for update in self._updates:
                update.make_gradients_static()
        return applied

    def _capture(self, batch: Batch) -> None:
        try:
            copies = {name: value.clone() for name, value in _tensors(batch).items()}
            self._inputs = replace(batch, **copies)
            graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
            with ExitStack() as stack:
                for update in self._updates:
                    stack.enter_context(update.being_captured())
                # With generation, which alone may launch nothing: kept features, true labels.
                with capturing(graphs[0], self._pool, self._stream):
                    self._scalars = self._learn(self._inputs, self._generate(self._inputs))
                with capturing(graphs[1], self._pool, self._stream):
                    self._applied = [update.apply() for update in self._updates]
            self._graphs = graphs
        except RuntimeError as error:
            self.failed = True
            self._inputs, self._scalars, self._applied = None, [], []
            reason = str(error).partition("\n")[0]
            if self._required:
                raise EnvironmentProblem(
                    f"--cuda-graphs on: the step cannot be captured: {reason}; "
                    "use --cuda-graphs auto"
                ) from error
            log.warning("CUDA graphs are off: the step cannot be captured: %s", reason)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Run on the side stream, in order with the current one."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what is called inside into `graph`.

    Raises the first error, with torch as it was before. Where CUDA breaks a capture off, ending it
    fails as well. torch would report that second error alone, stay on the capture's stream, keep
    the memory that the capture took, and treat the random generator as still being captured.
    """
    # thread_local: the thread that pins the loader's batches may call CUDA meanwhile.
    capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    index = stream.device_index
    generator = torch.cuda.default_generators[index]
    random_state = generator.get_state()
    first: BaseException | None = None
    # Restores the current stream.
    with torch.cuda.stream(torch.cuda.current_stream(index)):
        try:
            with capture:
                try:
                    yield
                except BaseException as error:
                    first = error
                    raise
            return
        except BaseException as error:
            first = first or error
    torch.cuda.synchronize(index)
    # Fails where torch has told its allocator of the end: nothing is held.
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    fresh = torch.Generator(torch.device("cuda", index))
    fresh.set_state(random_state)
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
    raise first


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
