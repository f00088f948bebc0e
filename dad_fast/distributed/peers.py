"""Find the process that died, hangs or was asked to stop when a collective fails.

The processes ask the store where they met, which outlives their connections. The store may be gone
too, or cut off from this machine, where a call would wait for an hour: each call has its own
deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from dad_fast import errors
from dad_fast.errors import DadFastError, PeerLost

# Seconds for the other processes to answer, with a margin for a busy machine.
ROLL_CALL = 10.0
# Seconds for the store to answer.
STORE = 2.0
# Keys in the store; the rank follows.
HERE, STOPPED = "dad_fast/here", "dad_fast/stopped"


def say_stopped(store: Any, rank: int, stop: DadFastError) -> None:
    """Tell the others that this process stops as requested, unless the store is gone."""
    _in_time(lambda: store.set(f"{STOPPED}/{rank}", type(stop).__name__), STORE)


def who_is_gone(store: Any, rank: int, world: int, why: str) -> DadFastError:
    """Return the error to raise: the Preempted or Interrupted of another process, or a PeerLost.

    The PeerLost names the processes that do not answer.
    """
    found = _in_time(lambda: _ask(store, rank, world, why), ROLL_CALL + STORE)
    return found or PeerLost(
        f"process 0 of {world}, or torchrun's rendezvous machine, is gone or cannot be reached; "
        f"this process stops too ({why})"
    )


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """Return the result of `ask`, or None where the store is gone or does not answer.

    The thread of a hanging call ends with the process.
    """
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(ask())
        except RuntimeError:
            # torch's error for a store that is gone.
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
                    f"stopped, as process {other} of {world} was asked to; "
                    "continue with --resume auto"
                )
            if time.monotonic() > deadline:
                silent.append(str(other))
                break
            time.sleep(0.05)
    if not silent:
        return PeerLost(f"the {world} processes are all there, but cannot reach each other ({why})")
    verb = "is" if len(silent) == 1 else "are"
    return PeerLost(
        f"process {', '.join(silent)} of {world} (counted from 0) {verb} gone; "
        f"this process stops too ({why})"
    )
