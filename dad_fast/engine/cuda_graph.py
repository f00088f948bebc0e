"""The step as CUDA graphs: generation, the student's gradients, and the update, captured once and replayed. Not yet run on a GPU.

The first steps run plainly, on a side stream: they are real steps, and they warm up what may not happen during a capture (cuBLAS,
autotuning, compilation, the optimizer's state). Then each of the three is captured, which runs nothing, and replayed from there on. The
three share one memory pool and replay in the order of their capture; between them stand whatever eager work a step needs (copying the
batch in, learning rates, and the all-reduce of several processes). Static are: the batch's tensors, the gradients, every output.
Random numbers stay right: a graph replays with the device generator's state of that moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.update import Update
from dad_fast.errors import EnvironmentProblem
from dad_fast.loggers.profiling import stage

if TYPE_CHECKING:
    from dad_fast.engine.step import Generated

log = logging.getLogger("dad_fast.engine")

WARM_UP = 3  # plain steps before the capture


class StepGraphs:
    """`learn` and `apply`, as `TrainStep` calls them, by replaying. Where a capture fails they stay plain calls, said once, unless
    `required`: then EnvironmentProblem.
    """

    def __init__(
        self,
        device: torch.device,
        generate: Callable[[Batch], Generated],
        learn: Callable[[Generated], dict[str, Tensor]],
        update: Update,
        required: bool,
    ) -> None:
        self._device, self._generate, self._learn, self._update, self._required = (
            device,
            generate,
            learn,
            update,
            required,
        )
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps = 0  # updates made so far
        self._inputs: Batch | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._scalars: dict[str, Tensor] = {}
        self._applied: Tensor | None = None
        self.failed = False

    @classmethod
    def if_wanted(
        cls,
        wanted: str,
        device: torch.device,
        generate: Callable[[Batch], Generated],
        learn: Callable[[Generated], dict[str, Tensor]],
        update: Update,
    ) -> StepGraphs | None:
        """wanted: auto (where it can be), on, off. Raises EnvironmentProblem for `on` on a CPU or with an optimizer that forbids it."""
        if wanted == "on" and device.type != "cuda":
            raise EnvironmentProblem(
                f"--cuda-graphs on: the run is on {device}; CUDA graphs need a CUDA device (auto does without)"
            )
        if wanted == "off" or device.type != "cuda":
            return None
        if not update.capturable:
            reason = f"{type(update.optimizer).__name__} takes its learning rate from the host, which a graph would freeze"
            if wanted == "on":
                raise EnvironmentProblem(
                    f"--cuda-graphs on: {reason}; use --opt adamw, adam or sgd, or --cuda-graphs auto"
                )
            log.warning("CUDA graphs are off: %s", reason)
            return None
        return cls(device, generate, learn, update, required=wanted == "on")

    @property
    def captured(self) -> bool:
        return bool(self._graphs)

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """Generation and the student's gradients for a micro-batch on the device. The scalars are overwritten by the next call."""
        if not self._graphs and not self.failed and self._steps >= WARM_UP:
            self._capture(batch)
        if not self._graphs:
            with self._aside():
                return self._learn(self._generate(batch))
        assert self._inputs is not None
        for name, static in _tensors(self._inputs).items():
            static.copy_(getattr(batch, name))
        with stage("generate"):
            self._graphs[0].replay()
        with stage("learn"):
            self._graphs[1].replay()
        return self._scalars

    def apply(self) -> Tensor:
        """The optimizer step."""
        self._steps += 1
        if not self._graphs:
            with self._aside():
                applied = self._update.apply()
            if (
                self._steps == WARM_UP
            ):  # the capture comes with the next step: by then the gradients stay where they are
                self._update.make_gradients_static()
            return applied
        self._graphs[2].replay()
        assert self._applied is not None
        return self._applied

    def _capture(self, batch: Batch) -> None:
        try:
            self._inputs = replace(
                batch, **{name: value.clone() for name, value in _tensors(batch).items()}
            )
            graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
            with capturing(graphs[0], self._pool, self._stream):
                generated = self._generate(self._inputs)
            with capturing(graphs[1], self._pool, self._stream):
                self._scalars = self._learn(generated)
            with capturing(graphs[2], self._pool, self._stream):
                self._applied = self._update.apply()
            self._graphs = graphs
        except RuntimeError as error:
            self.failed = True
            self._inputs, self._scalars = None, {}
            reason = str(error).partition("\n")[0]
            if self._required:
                raise EnvironmentProblem(
                    f"--cuda-graphs on: the step cannot be captured: {reason}; use --cuda-graphs auto"
                ) from error
            log.warning("CUDA graphs are off: the step cannot be captured: %s", reason)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what is called inside into `graph`. Raises what went wrong first; torch is then as it was before.

    Where CUDA breaks a capture off, ending it fails as well. torch would report that second error alone, stay on the capture's stream,
    keep the memory that the capture took, and hold that the random generator is still being captured.
    """
    # thread_local: the thread that pins the loader's batches may call CUDA meanwhile
    capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    index = stream.device_index
    generator = torch.cuda.default_generators[index]
    random_state = generator.get_state()
    first: BaseException | None = None
    with torch.cuda.stream(
        torch.cuda.current_stream(index)
    ):  # what is current now is so again afterwards
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
    with suppress(RuntimeError):  # torch told its allocator of the end: nothing is held
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    fresh = torch.Generator(torch.device("cuda", index))
    fresh.set_state(random_state)
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
    raise first


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
