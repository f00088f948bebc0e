"""Class lists and loading of teachers for tests."""

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
from timm.data import ImageNetInfo

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.models.load_teacher import load_teacher

CPU, FLOAT32 = torch.device("cpu"), PrecisionConfig()
WNIDS = ImageNetInfo().label_names()


def class_map(*folders):
    return ClassMap(
        tuple((i, folder, folder.replace("_", " ")) for i, folder in enumerate(folders))
    )


ANIMALS = class_map("ant", "queen_bee", "cat")


def load(name, classes=ANIMALS, precision=FLOAT32, **settings):
    return load_teacher(TeacherConfig(name=str(name), **settings), classes, precision, CPU)


def refuse(error, words, name, classes=ANIMALS, **settings):
    with pytest.raises(error) as caught:
        load(name, classes, **settings)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
