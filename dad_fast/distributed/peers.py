"""When processes of a run cannot reach one another: which of them is gone, or was asked to stop.

They ask the store where all of them met, which outlives the connections between them. It may be gone as well, or be on the other side of a
network that carries nothing any more, where a call would wait for an hour: so each call has a deadline of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from dad_fast import errors
from dad_fast.errors import DadFastError, PeerLost

ROLL_CALL = 10.0  # seconds in which every process that is left answers; a busy machine may stop one for some of them
STORE = 2.0  # seconds in which the store answers
HERE, STOPPED = "dad_fast/here", "dad_fast/stopped"  # in the store, by rank


def say_stopped(store: Any, rank: int, stop: DadFastError) -> None:
    """Tell the others that this process leaves because it was asked to; if the store is gone, there is nobody left to tell."""
    _in_time(lambda: store.set(f"{STOPPED}/{rank}", type(stop).__name__), STORE)


def who_is_gone(store: Any, rank: int, world: int, why: str) -> DadFastError:
    """The error to end with: another one's Preempted or Interrupted, else a PeerLost that names those who do not answer."""
    found = _in_time(lambda: _ask(store, rank, world, why), ROLL_CALL + STORE)
    gone = f"process 0 of {world}, or the machine that torchrun met on, is gone or cannot be reached; this process stops too ({why})"
    return found or PeerLost(gone)


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """What `ask` returns; None where the store is gone or does not answer. The thread of a call that hangs ends with the process."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(ask())
        except RuntimeError:  # torch's errors of a store
            pass

    asking = threading.Thread(target=work, daemon=True, name="roll call")
    asking.start()
    asking.join(seconds)
    return found[0] if found else None


def _ask(store: Any, rank: int, world: int, why: str) -> DadFastError:
    silent = []
    store.set(f"{HERE}/{rank}", "1")
    deadline = time.monotonic() + ROLL_CALL
    for other in range(world):
        while other != rank and not store.check([f"{HERE}/{other}"]):
            if store.check([f"{STOPPED}/{other}"]):
                kind = getattr(errors, store.get(f"{STOPPED}/{other}").decode())
                return kind(
                    f"stopped, as process {other} of {world} was asked to; go on with --resume auto"
                )
            if time.monotonic() > deadline:
                silent.append(str(other))
                break
            time.sleep(0.05)
    if not silent:
        return PeerLost(f"the {world} processes are all there, but cannot reach each other ({why})")
    names, verb = ", ".join(silent), "is" if len(silent) == 1 else "are"
    return PeerLost(
        f"process {names} of {world} (counted from 0) {verb} gone; this process stops too ({why})"
    )
