"""What a run tells its user once, when it shows: that it waits for its data or its disk, that latents are not numbers, that its attack
is lost."""

from __future__ import annotations

from collections.abc import Callable

from dad_fast.config.schema import Config
from dad_fast.engine.build import Components
from dad_fast.engine.step_timer import Window, input_bound

WAIT = 1.0  # seconds for which a step may wait for the disk without a word
VISIBLE = 3.0  # times the encoder's rounding, from which on an attack is more than chance


class Advice:
    def __init__(self, cfg: Config, parts: Components, loader: str) -> None:
        self._cfg, self._parts, self._loader = cfg, parts, loader
        self._windows, self._advised, self._waited, self._warned = 0, False, False, False

    def on_window(self, window: Window, say: Callable[[str], None]) -> None:
        """At log steps. The first window holds the start of the loader's processes, and kept features need no loader's processes."""
        self._windows += 1
        if not self._advised and self._windows > 1 and self._loader != "features":
            cuda = self._parts.device.type == "cuda"
            advice = input_bound(
                window, self._cfg.data.global_batch_size, self._cfg.data.workers, self._loader, cuda
            )
            if advice:
                self._advised = True
                say(advice)
        discretizer = self._parts.discretizer
        if discretizer is not None and not self._warned:
            for warning in discretizer.warnings():
                self._warned = True
                say(f"warning: {warning}")

    def on_write(self, waited: float, say: Callable[[str], None]) -> None:
        """Once: that a checkpoint was due before the one before it was written, so that training waited for the disk."""
        if waited > WAIT and not self._waited:
            self._waited = True
            say(
                f"training waited {waited:.1f} s for the checkpoint before to be written; raise --checkpoint-every-steps"
            )

    def on_attack(self, signal_to_rounding: float, say: Callable[[str], None]) -> None:
        """Once a run: whether the attack can be seen above the encoder's rounding."""
        if signal_to_rounding < VISIBLE:
            say(
                f"warning: the attack moves the encoder's output only {signal_to_rounding:.2g} times as much as rounding does, so many "
                "codes change by chance; raise --attack-eps, or set precision.encoder=float32"
            )
