"""The step as CUDA graphs: for each learner its gradients and its update, captured once and
replayed. The gradients of the first learner come with the generation.

The first steps run plainly, on a side stream: they are real steps, and they warm up what may not
happen during a capture (cuBLAS, autotuning, compilation, the optimizer's state). Then each graph is
captured, which runs nothing, and replayed from there on. The graphs share one memory pool and
replay in the order of their capture; between them stands the eager work of a step (copying the
batch in, learning rates, and the all-reduce of several processes). The batch's tensors, the
gradients and every output keep their addresses. Random numbers stay right: a graph replays with the
state that the generator of its learner has at that moment. Not yet run on a GPU.
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
from dad_fast.engine.learner import Learner
from dad_fast.errors import EnvironmentProblem
from dad_fast.loggers.profiling import stage

log = logging.getLogger("dad_fast.engine")

WARM_UP = 3  # plain steps before the capture
Generate = Callable[[Batch], StepInputs]
Learn = Callable[[Learner, Batch, StepInputs], dict[str, Tensor]]


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
        learners: Sequence[Learner],
        required: bool,
    ) -> None:
        self._device = device
        self._generate = generate
        self._learn = learn
        self._learners = learners
        self._required = required
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps = 0  # updates made so far
        self._inputs: Batch | None = None
        # The same order as the learners.
        self._learn_graphs: list[torch.cuda.CUDAGraph] = []
        self._apply_graphs: list[torch.cuda.CUDAGraph] = []
        # Held: what the first graph makes and the others read.
        self._shared: StepInputs | None = None
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
        learners: Sequence[Learner],
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
        for learner in learners:
            if learner.update.capturable:
                continue
            name = type(learner.update.optimizer).__name__
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
        return cls(device, generate, learn, learners, required=wanted == "on")

    @property
    def captured(self) -> bool:
        return bool(self._learn_graphs)

    def learn(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Generate from a micro-batch on the device and add the gradients of every learner.

        Returns each learner's scalars, which the next call overwrites.
        """
        if not self.captured and not self.failed and self._steps >= WARM_UP:
            self._capture(batch)
        if not self.captured:
            with self._aside():
                with self._learners[0].own_random():
                    inputs = self._generate(batch)
                results = []
                for learner in self._learners:
                    with learner.own_random():
                        results.append(self._learn(learner, batch, inputs))
                return results
        assert self._inputs is not None
        for name, static in _tensors(self._inputs).items():
            static.copy_(getattr(batch, name))
        with stage("learn"):
            self._replay(self._learn_graphs)
        return self._scalars

    def apply(self) -> list[Tensor]:
        """Make every learner's optimizer step. Returns whether each was applied."""
        self._steps += 1
        if self.captured:
            self._replay(self._apply_graphs)
            return self._applied
        applied = []
        with self._aside():
            for learner in self._learners:
                with learner.own_random():
                    applied.append(learner.update.apply())
        if self._steps == WARM_UP:
            # The capture comes with the next step: by then the gradients must stay where they are.
            for learner in self._learners:
                learner.update.make_gradients_static()
        return applied

    def _replay(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        for graph, learner in zip(graphs, self._learners, strict=True):
            with learner.own_random():
                graph.replay()

    def _capture(self, batch: Batch) -> None:
        try:
            copies = {name: value.clone() for name, value in _tensors(batch).items()}
            inputs = self._inputs = replace(batch, **copies)
            learn_graphs, apply_graphs = (
                [torch.cuda.CUDAGraph() for _ in self._learners] for _ in range(2)
            )
            with ExitStack() as stack:
                for learner in self._learners:
                    stack.enter_context(learner.update.being_captured())
                for graph, learner in zip(learn_graphs, self._learners, strict=True):
                    with learner.own_random(), capturing(graph, self._pool, self._stream):
                        if self._shared is None:
                            # With a learner: alone it may launch nothing, such as with kept
                            # features and true labels.
                            self._shared = self._generate(inputs)
                        self._scalars.append(self._learn(learner, inputs, self._shared))
                for graph, learner in zip(apply_graphs, self._learners, strict=True):
                    with learner.own_random(), capturing(graph, self._pool, self._stream):
                        self._applied.append(learner.update.apply())
            self._learn_graphs, self._apply_graphs = learn_graphs, apply_graphs
        except RuntimeError as error:
            self.failed = True
            self._inputs, self._shared, self._scalars, self._applied = None, None, [], []
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
