"""Loader processes: their start, the signals they ignore, and one-line errors for their failures.

They come from a fork server: a fork of the training process would copy locks that its threads
(autograd, CUDA, the live progress bar) may hold at that moment, a rare hang. They do not run the
main script again, so it needs no `if __name__ == "__main__":`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from dad_fast.config.setting import AUTO
from dad_fast.cores import usable_cores
from dad_fast.errors import DadFastError

# Loader processes beyond this number seldom help, and each takes memory.
MOST_WORKERS = 16
# Interval between checks for dead workers.
CHECK_SECONDS = 5.0
# Time without a batch from any worker after which they count as hung (network disk, deadlock).
HANG_SECONDS = 600.0


class _Failure(NamedTuple):
    """An exception of a worker on its way to the training process.

    DataLoader itself would bury the message in a traceback.
    """

    error: DadFastError
    trace: str


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DadFastError as error:
            return _Failure(error, traceback.format_exc())
        except Exception as error:
            message = (
                f"a loader worker failed: {type(error).__name__}: {error} (--debug shows where)"
            )
            return _Failure(DadFastError(message), traceback.format_exc())


def loader_processes(workers: int) -> int:
    """Return the number of loader processes for `data.workers`: for AUTO, one per core.

    Processes of one run on this machine share its cores, as runs side by side do.
    """
    if workers != AUTO:
        return workers
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    together = int(text) if text.isdecimal() and int(text) else 1
    return min(MOST_WORKERS, max(1, usable_cores() // together))


def iterate(
    dataset: Dataset[Any], numbers: Sequence[Any], workers: int, pin_memory: bool
) -> Iterator[Any]:
    """Yield dataset[n] for each n, in order, made by `workers` processes (0: this process, AUTO: by
    cores).

    Each item is a whole batch. Raises DadFastError with one line when a worker fails, dies or
    hangs; a DadFastError of a worker is raised unchanged.
    """
    workers = loader_processes(workers)
    if workers:
        batches = _from_workers(dataset, numbers, workers, pin_memory)
    else:
        batches = _from_here(dataset, numbers, pin_memory)
    _running.add(batches)
    return batches


def _from_here(
    dataset: Dataset[Any], numbers: Sequence[Any], pin_memory: bool
) -> Generator[Any, None, None]:
    for number in numbers:
        batch = dataset[number]
        yield batch.pin_memory() if pin_memory else batch


def _from_workers(
    dataset: Dataset[Any], numbers: Sequence[Any], workers: int, pin_memory: bool
) -> Generator[Any, None, None]:
    # More workers than cores; `doctor --data` reports what helps.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        timeout=CHECK_SECONDS,
        multiprocessing_context=_context(),
        worker_init_fn=_init_worker,
        # Each pass would otherwise draw from the global generator, whose state a resume restores.
        generator=torch.Generator(),
    )
    with _without_main_script():
        batches = iter(loader)
    waited = 0.0
    try:
        while True:
            try:
                batch = next(batches)
                waited = 0.0
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" in str(error):
                    waited += CHECK_SECONDS
                    if waited < HANG_SECONDS:
                        continue
                    # A hung worker would neither end nor react to SIGTERM.
                    for worker in batches._workers:
                        worker.kill()
                    raise DadFastError(
                        f"no batch for {HANG_SECONDS:g} s: a loader worker hangs "
                        "(a network disk that does not answer?); "
                        "fix that and continue with --resume auto"
                    ) from error.with_traceback(None)
                if "worker" not in str(error):
                    raise
                why = " ".join(str(error).split())[:200]
                raise DadFastError(
                    f"a loader worker died ({why}); "
                    "out of memory or of /dev/shm? Fewer --workers, or 0, may help"
                ) from error.with_traceback(None)
            if isinstance(batch, _Failure):
                raise batch.error from RuntimeError(batch.trace)
            yield batch
    finally:
        # Ends the workers now, not when the traceback that holds this frame is dropped.
        del batches


_running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _close_running() -> None:
    """End the workers of unfinished loaders.

    multiprocessing would wait for them at exit, since they ignore its SIGTERM.
    """
    for batches in list(_running):
        # Another thread may be advancing the generator at this moment.
        with suppress(ValueError, RuntimeError):
            batches.close()


@contextmanager
def _without_main_script() -> Iterator[None]:
    """Keep processes that start inside the block from running the main script.

    multiprocessing runs it in every process for the objects that it defines; loaders use none.
    """
    main: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def _as_is(batch: Any) -> Any:
    return batch


@lru_cache(maxsize=1)
def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dad_fast.data.loaders.fork_server"])
    return context


def _init_worker(worker: int) -> None:
    # The training process handles these signals and still needs batches.
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Pillow's warnings name lines of its own code, and no file.
    warnings.filterwarnings("ignore", module="PIL")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the training process is gone.

    DataLoader's own watch sees only the fork server, which lives as long as its workers do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
