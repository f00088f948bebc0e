"""Numbers that are "auto", and the preset finetune."""

from __future__ import annotations

import pytest

from dad_fast.cli.main import main
from dad_fast.config.resolve import gather
from dad_fast.config.schema import Config
from dad_fast.config.toml import from_toml, to_toml
from dad_fast.data.loaders.workers import MOST_WORKERS, loader_processes
from dad_fast.engine.sizes import batch_size, num_epochs, with_numbers
from dad_fast.errors import UsageError
from dad_fast.methods.registry import METHODS
from dad_fast.methods.settings import check
from dad_fast.sweep.runs import make_sweep
from dad_fast.tools.evaluate_checks import settings_of
from tests.tiny import write_images


def finetune(**flags):
    given = {"data.data_dir": "photos", "discretizer.name": "jpeg:75", **flags}
    return gather("finetune", None, (), given)


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(100, 8, 100), (1_000, 32, 100), (10_000, 128, 50), (100_000, 128, 15)],
)
def test_batch_and_epochs_follow_from_the_number_of_images(images, batch, epochs):
    cfg = with_numbers(finetune(), images)
    assert (cfg.data.batch_size, cfg.schedule.epochs) == (batch, epochs)
    assert cfg.schedule.warmup_epochs == pytest.approx(epochs / 10)
    assert batch % 2 == 0 and batch <= images


def test_processes_share_the_batch():
    assert [batch_size(10_000, at_once) for at_once in (1, 2, 3, 8, 500)] == [128, 64, 42, 16, 2]
    assert num_epochs(0) == 100
    assert with_numbers(finetune(), 10_000, lambda: 4).data.batch_size == 32


def test_numbers_that_are_given_stay():
    cfg = with_numbers(finetune(**{"schedule.epochs": "3", "attack.eps": "0.5"}), 1_000)
    assert (cfg.schedule.epochs, cfg.schedule.warmup_epochs) == (3, 0.3)
    assert (cfg.attack.eps, cfg.attack.step_size, cfg.data.batch_size) == (0.5, 0.5, 32)
    assert with_numbers(Config()) == Config()


def test_the_budget_is_the_papers_for_a_vqgan_and_larger_where_it_would_be_hidden():
    assert with_numbers(finetune(), 1).attack.eps > 0.1
    vqgan = with_numbers(finetune(**{"discretizer.name": "vqgan.ckpt"}), 1).attack
    assert vqgan.eps == vqgan.step_size == 0.1


@pytest.mark.parametrize("method", METHODS.own_names())
@pytest.mark.parametrize("discretizer", ["jpeg:75", "vqgan.ckpt"])
def test_the_preset_fits_every_method_and_discretizer(method, discretizer):
    cfg = finetune(method=method, **{"discretizer.name": discretizer})
    check(cfg)
    check(with_numbers(cfg, 3_000))


def test_auto_survives_a_file_and_is_refused_where_it_has_no_meaning():
    cfg = finetune()
    assert 'batch_size = "auto"' in to_toml(cfg) and from_toml(to_toml(cfg)) == cfg
    with pytest.raises(UsageError, match="must be 1 or more, or auto"):
        finetune(**{"data.batch_size": "0"})
    with pytest.raises(UsageError, match="must be a number, got 'auto'"):
        finetune(**{"optim.lr": "auto"})
    with pytest.raises(UsageError, match="--attack-eps auto is an L2 budget"):
        with_numbers(finetune(**{"attack.norm": "linf"}), 100)


def test_a_run_gets_numbers_and_those_must_fit_together(tmp_path):
    write_images(tmp_path, per_class=8)
    cfg = finetune(**{"data.data_dir": str(tmp_path), "student.name": "resnet18"})
    (run,) = make_sweep(cfg, tmp_path / "run").runs
    assert "auto" not in to_toml(run.cfg).partition("[schedule]")[2].partition("[ema]")[0].replace(
        "auto:", ""
    )
    assert (run.cfg.data.batch_size, run.cfg.schedule.epochs) == (8, 100)
    late = finetune(**{"data.data_dir": str(tmp_path), "schedule.warmup_epochs": "101"})
    with pytest.raises(UsageError, match="--warmup-epochs 101 is more than --epochs 100"):
        make_sweep(late, tmp_path / "run")


def test_loader_processes_by_cores(monkeypatch):
    monkeypatch.setattr("dad_fast.cores.num_cores", lambda: 12)
    assert [loader_processes(workers) for workers in (0, 3, -1)] == [0, 3, 12]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader_processes(-1) == 3
    monkeypatch.setattr("dad_fast.cores.num_cores", lambda: 400)
    assert loader_processes(-1) == MOST_WORKERS


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--wandb", "did you mean --log-to wandb?"),
        ("--log-wandb", "did you mean --log-to wandb?"),
        ("--num-workers", "did you mean --workers"),
    ],
)
def test_flags_of_other_trainers_are_explained(capsys, flag, message):
    assert main(["train", "--preset", "demo", flag, "1"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["kd", "dad"])
def test_a_method_of_the_demo_is_one_run_in_the_output_folder(tmp_path, method):
    cfg = gather("demo", None, (), {"method": method})
    (run,) = make_sweep(cfg, tmp_path / "run").runs
    assert run.folder == tmp_path / "run" and run.variant == run.cfg.method == method


def test_the_batch_of_an_evaluation_has_no_size_to_follow(tmp_path):
    flags = {"data.data_dir": "embedded:digits", "data.batch_size": "auto"}
    assert settings_of([], flags).data.batch_size == Config().data.batch_size
    file = tmp_path / "model.safetensors"
    file.touch()
    (tmp_path / "config.toml").write_text('[data]\ndata_dir = "embedded:digits"\nbatch_size = 20\n')
    assert settings_of([str(file)], flags).data.batch_size == 20
