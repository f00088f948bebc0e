"""Teachers from a local file or a run's folder: metadata says which kind of model it is."""

from __future__ import annotations

from dad_fast.errors import DataError
from dad_fast.models.places import checkpoint_file
from dad_fast.models.teacher import Teacher, TeacherContext
from dad_fast.models.timm_teacher import load_run
from dad_fast.models.weights.declared import PROBE, STUDENT, probe_spec
from dad_fast.models.weights.files import read_state_dict


def load_file(argument: str, context: TeacherContext) -> Teacher:
    """Load a run of this project, or a safetensors file with its CLIP as metadata.

    See `load_teacher` for the errors.
    """
    path = checkpoint_file(argument)
    state, metadata = read_state_dict(path)
    if STUDENT in metadata:
        return load_run(path, state, metadata, context)
    if PROBE in metadata:
        encoder = probe_spec(path, metadata)["teacher"]
        raise DataError(
            f"--teacher {argument}: a linear probe; write --teacher {encoder} --teacher-head {path}"
        )
    # open_clip is imported only for its own models.
    from dad_fast.models.clip_teacher import load_own_clip

    return load_own_clip(path, state, metadata, context)
