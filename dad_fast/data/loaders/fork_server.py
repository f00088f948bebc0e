"""Preloaded into multiprocessing's fork server, which loader processes are forked from; nothing else imports this module.

torch is imported once there instead of once in every worker. The server ignores the signals by which clusters announce a
preemption: the training process answers them, and it needs its workers until the state is saved.
"""

from __future__ import annotations

import signal

import dad_fast.data.loaders.loader  # noqa: F401 (imported here so that every worker has it)

for _name in ("SIGTERM", "SIGUSR1"):
    if hasattr(signal, _name):
        signal.signal(getattr(signal, _name), signal.SIG_IGN)
