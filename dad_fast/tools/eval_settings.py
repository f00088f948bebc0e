"""Settings of an evaluation: of the run that is evaluated, overridden by the typed flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dad_fast.config import Config, from_toml
from dad_fast.config.fields import coerce, settings, with_values
from dad_fast.config.schema import TeacherConfig
from dad_fast.errors import UsageError
from dad_fast.files import read_text
from dad_fast.models.student import checkpoint_file


def settings_of(runs: Sequence[str], flags: Mapping[str, Any]) -> Config:
    """Return the settings of the first run among the models, overridden by the typed flags."""
    cfg = Config()
    for run in runs:
        folder = checkpoint_file(run).absolute().parent
        # In the run's folder, which for a checkpoint is two levels up: RUN/checkpoints/step-N.
        candidates = (folder / "config.toml", folder.parent.parent / "config.toml")
        config = next((path for path in candidates if path.is_file()), None)
        if config is not None:
            cfg = from_toml(read_text(config), str(config))
            break
    values = {
        path: coerce(settings()[path], value, settings()[path].flag)
        for path, value in flags.items()
    }
    # The run's teacher is evaluated only on request, the image size is the model's own, and PIL
    # decodes. --batch-size is the batch of this command.
    cfg = with_values(
        cfg,
        {
            "teacher": TeacherConfig(),
            "device": "auto",
            "augment.img_size": 0,
            "data.loader": "torchvision",
        },
    )
    cfg = with_values(cfg, values | ({"eval.batch_size": 0} if "data.batch_size" in values else {}))
    if not cfg.data.data_dir and not cfg.eval.suites:
        raise UsageError(
            "no data: add --data-dir (an image folder or embedded:digits); no config.toml next to "
            "the checkpoint names it"
        )
    return cfg
