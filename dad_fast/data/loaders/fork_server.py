"""Preload of multiprocessing's fork server, from which loader processes are forked.

Nothing else imports this module. torch is imported once here instead of once in every worker. The
server ignores the signals by which clusters announce a preemption: the training process handles
them and needs its workers until the state is saved.
"""

from __future__ import annotations

import signal

# Imported so that every worker has it.
import dad_fast.data.loaders.loader  # noqa: F401

for _name in ("SIGTERM", "SIGUSR1"):
    if hasattr(signal, _name):
        signal.signal(getattr(signal, _name), signal.SIG_IGN)
