"""Speed settings that are "auto": decided by device and student, and recorded with the reason."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from dad_fast.config import Config, from_toml, to_toml
from dad_fast.config.fields import with_values
from dad_fast.config.schema import PrecisionConfig
from dad_fast.data.sources.registry import open_source
from dad_fast.engine import choices, frozen
from dad_fast.engine.choices import Choice, DeviceFacts, choose, settle

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CONVOLUTIONAL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
# One convolution, the patch embedding.
TRANSFORMER = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Linear(4, 4))
H200 = DeviceFacts("cuda", bfloat16=True)
T4 = DeviceFacts("cuda", bfloat16=False)


def switches(cfg, facts, student):
    settled = choose(facts, student).settled(cfg)
    found = (settled.precision.amp, settled.precision.channels_last, settled.engine.torchcompile)
    assert {type(value) for value in found} == {bool}
    return found


@pytest.mark.parametrize(
    ("facts", "student", "expected"),
    [
        (DeviceFacts("cpu"), CONVOLUTIONAL, (False, False, False)),
        (H200, CONVOLUTIONAL, (True, True, True)),
        (H200, TRANSFORMER, (True, False, True)),
        (H200, None, (True, True, True)),
        (T4, CONVOLUTIONAL, (False, True, True)),
    ],
)
def test_auto_follows_device_and_student(facts, student, expected):
    assert switches(Config(), facts, student) == expected


@pytest.mark.parametrize("word", ["on", "off", "true", "false"])
def test_what_the_user_asks_for_overrides_auto(word):
    text = (
        f"[precision]\namp = '{word}'\nchannels_last = '{word}'\n[engine]\ntorchcompile = '{word}'"
    )
    asked = from_toml(text)
    for facts in (DeviceFacts("cpu"), H200):
        assert switches(asked, facts, TRANSFORMER) == (word in ("on", "true"),) * 3
        record = choose(facts, TRANSFORMER).record(asked)
        assert {choice.reason for choice in record.values()} == {"asked for"}


def test_settled_settings_leave_the_recorded_ones_as_they_are():
    cfg = Config()
    assert choose(H200).settled(cfg).precision.amp is True
    assert 'amp = "auto"' in to_toml(cfg)
    assert dataclasses.asdict(choose(H200).settled(cfg).precision)["amp"] is True


def test_an_undecided_auto_counts_as_off():
    assert not PrecisionConfig().amp and not PrecisionConfig().channels_last


@pytest.mark.parametrize(("amp", "dtype"), [(True, "float16"), (False, "float32")])
def test_dtypes_of_the_stages(amp, dtype):
    cfg = with_values(Config(), {"precision.amp": amp, "precision.encoder": "float16"})
    assert choices.stage_dtypes(cfg.precision, ["encoder"])["dtype.encoder"].value == dtype


def test_convolutions_are_timed_on_a_gpu_unless_determinism_is_asked_for():
    assert not choices.convolution_benchmark(CPU).value
    assert choices.convolution_benchmark(CUDA).value
    torch.use_deterministic_algorithms(True)
    try:
        assert not choices.convolution_benchmark(CUDA).value
    finally:
        torch.use_deterministic_algorithms(False)


def test_cudnn_benchmark_is_on_inside_the_block_alone():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    with choices.fast_convolutions(CPU):
        assert cudnn.benchmark == before
    with pytest.raises(ValueError, match="inside"), choices.fast_convolutions(CUDA):
        assert cudnn.benchmark
        raise ValueError("inside")
    assert cudnn.benchmark == before


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_choice_has_a_word_and_a_reason(device):
    found = [
        choices.attention(device),
        choices.float32_arithmetic(device, True),
        choices.float32_arithmetic(device, False),
        choices.cuda_graphs("auto", device, used=False),
        choices.cuda_graphs("off", device, used=False),
        choices.cuda_graphs("auto", device, used=True),
        *choose(H200, CONVOLUTIONAL).record(Config()).values(),
    ]
    for choice in found:
        assert all(choice.record().values())
    assert str(Choice(True, "why")) == "on (why)"


@pytest.mark.parametrize("channels_last", ["on", "off", "auto"])
def test_convolutional_teacher_follows_channels_last(channels_last):
    values = {"precision.channels_last": channels_last, "teacher.name": "embedded:digits"}
    cfg = with_values(Config(), values)
    cpu = torch.device("cpu")
    classes = open_source("embedded:digits", "train").classes
    model = frozen.teacher(settle(cfg, cpu), classes, cpu).model
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    wide = [weight for weight in weights if weight.shape[1] > 1 and weight.shape[2] > 1]
    assert wide
    is_nhwc = [weight.is_contiguous(memory_format=torch.channels_last) for weight in wide]
    assert all(is_nhwc) if channels_last == "on" else not any(is_nhwc)
