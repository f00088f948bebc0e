"""`dad-fast fit-discretizer`: training, exact resume, files, errors."""

import json
import re
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from PIL import Image

from dad_fast.cli.main import main
from dad_fast.config.options_fit import FitOptions
from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.config import VQGANConfig
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.discretizers.vqgan.training import (
    DeadCodes,
    MovingCodebook,
    perplexity,
    training_pass,
)
from dad_fast.loggers.run_log import read_metrics
from dad_fast.models.weights.files import read_state_dict
from dad_fast.tools.fit_discretizer.fit import Fit
from tests.fits import stop_in_second_step
from tests.tiny import write_images

SMALL = [
    *("--width", "8", "--codes", "32", "--img-size", "16", "--batch-size", "4"),
    *("--workers", "0", "--log-every", "2", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), per_class=4)


def run(data, output, *more):
    arguments = ["--data-dir", str(data), "-o", str(output), *SMALL, *map(str, more)]
    return main(["fit-discretizer", *arguments])


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    """Four steps at once."""
    output = tmp_path_factory.mktemp("fitted") / "vq.safetensors"
    assert run(data, output, "--max-steps", "4", "--epochs", "3") == 0
    return output


def test_result_is_a_discretizer_with_log_and_sheet(fitted):
    found = load_discretizer(str(fitted), PrecisionConfig(), torch.device("cpu"))
    images, codes = found(torch.rand(2, 3, 16, 16))
    assert codes.shape == (2, 4, 4) and images.shape == (2, 3, 16, 16)
    assert found.image_size == 16 and "12 images of 3 classes" in found.provenance
    folder = fitted.parent / "vq-fit"
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size[0] > 300
    rows = read_metrics(folder, "train")
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 < row["codes_used"] <= 1 and row["perplexity"] >= 1 for row in rows)
    (val,) = read_metrics(folder, "val")
    assert 0 < val["rms"] < 1
    log = (folder / "train.log").read_text()
    assert "4x4 of 32 per image" in log and "--discretizer" in log


def test_resume_is_bit_exact(fitted, data, tmp_path, monkeypatch):
    """Stop after two of four steps with SIGTERM's request, and continue."""
    output = tmp_path / "vq.safetensors"
    with monkeypatch.context() as patch:
        stop_in_second_step(patch)
        assert run(data, output, "--max-steps", "4", "--epochs", "3") == 75
    assert not output.exists() and (tmp_path / "vq-fit" / "checkpoints" / "step-2").is_dir()
    more = ("--max-steps", "4", "--epochs", "3", "--resume", "auto")
    assert run(data, output, *more) == 0
    assert output.read_bytes() == fitted.read_bytes()

    def steps(folder):
        return [
            {key: value for key, value in row.items() if key != "time"}
            for row in read_metrics(folder, "train")
        ]

    assert steps(tmp_path / "vq-fit") == steps(fitted.parent / "vq-fit")
    # Once more: nothing is left to do.
    assert run(data, output, *more) == 0 and output.read_bytes() == fitted.read_bytes()


def test_a_share_of_the_training_images_is_held_out(data, tmp_path, capsys):
    images = tmp_path / "data"
    shutil.copytree(data / "train", images / "train")
    output = tmp_path / "vq.safetensors"
    assert run(images, output, "--max-steps", "1") == 4
    assert "--val-split val" in capsys.readouterr().err
    assert run(images, output, "--max-steps", "1", "--val-fraction", "0.25") == 0
    found = load_discretizer(str(output), PrecisionConfig(), torch.device("cpu"))
    assert "9 of its 12 images" in found.provenance and "without those held out" in found.provenance
    assert "on val an rms error" in capsys.readouterr().err


def test_existing_results_are_refused_and_replaced(fitted, data, tmp_path, capsys):
    output = tmp_path / "vq.safetensors"
    output.write_bytes(fitted.read_bytes())
    assert run(data, output, "--max-steps", "1") == 2
    assert "vq.safetensors exists: add --resume auto or --overwrite" in capsys.readouterr().err
    assert run(data, output, "--max-steps", "1", "--levels", "4,4", "--overwrite") == 0
    assert VQGAN.load(output).config.levels == (4, 4)
    assert "FSQ [4, 4]" in capsys.readouterr().err
    code = run(data, output, "--max-steps", "1", "--levels", "4,5", "--resume", "auto")
    error = capsys.readouterr().err
    assert code == 2 and "was made with levels 4,4, not 4,5" in error


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--img-size", "18"], 2, "--img-size 18: no multiple of --factor 4.* use 16"),
        (["--img-size", "4"], 4, "images of 4 px are too small for --factor 4"),
        (["--train-split", "nowhere"], 4, "nowhere"),
        (
            ["--val-split", "nowhere"],
            4,
            '--val-split nowhere: .* --val-fraction 0.1, or "" for training',
        ),
        (["--val-fraction", "0.2", "--val-split", ""], 2, "--val-fraction .*: leave one out"),
        (["--val-fraction", "1"], 2, "--val-fraction 1: must be from 0"),
        (["--batch-size", "100"], 2, "--batch-size 100: .* only 12 images"),
        (["--levels", "8,1"], 2, "--levels 8,1: write numbers of levels"),
        (["--levels", "256,256,256"], 2, "at most 65,536 codes"),
        (["--width", "6"], 2, "--width 6: must be a multiple of 4"),
        (["--factor", "3"], 2, "--factor 3: must be one of 2, 4, 8, 16"),
        (["--lr", "0"], 2, "--lr 0: must be a number above 0"),
        (["--decay", "1"], 2, "--decay 1: must be from 0"),
        (["--resume", "x"], 2, "--resume x: must be auto"),
        (["--device", "cuda:99"], 3, "--device"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    data, tmp_path, capsys, more, code, message
):
    assert run(data, tmp_path / "vq.safetensors", *more) == code
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_output_must_be_safetensors(data, capsys):
    assert main(["fit-discretizer", "--data-dir", str(data), "-o", "vq.pt"]) == 2
    assert "--output vq.pt: name a .safetensors file" in capsys.readouterr().err
    assert main(["fit-discretizer", "-o", "vq.safetensors"]) == 2
    assert "add --data-dir" in capsys.readouterr().err


def tiny_vqgan(**more):
    torch.manual_seed(0)
    shape = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_levels": (), "norm_groups": 4}
    return VQGAN(VQGANConfig(**{**shape, "n_embed": 16, **more}))


@pytest.mark.parametrize("more", [{}, {"quantizer": "fsq", "levels": (2, 2, 2, 2)}])
def test_reconstruction_improves(more):
    levels = "2,2,2,2" if more else ""
    options = FitOptions(width=4, codes=16, factor="2", levels=levels, lr=1e-2, epochs=20)
    torch.manual_seed(0)
    fit = Fit(options, 20, torch.device("cpu"))
    pixels = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(8, 3, 4, 4)
    fit.step(0, 1, pixels)
    first = fit.window()["l2"]
    for number in range(1, 12):
        fit.step(number, 1, pixels)
    last = fit.window()
    assert last["l2"] < 0.7 * first


def test_gradient_skips_the_rounding_and_commitment_pulls_latents():
    vqgan = tiny_vqgan()
    pixels = torch.rand(2, 3, 8, 8)
    latents = vqgan.encode(pixels).detach().requires_grad_()
    found = training_pass(vqgan, pixels, latents)
    (at_latents,) = torch.autograd.grad(found.l2, latents, retain_graph=True)
    chosen = vqgan.quantize.embedding(found.codes).permute(0, 3, 1, 2).detach().requires_grad_()
    error = vqgan.decoder(vqgan.post_quant_conv(chosen)) - (2 * pixels - 1)
    (at_codes,) = torch.autograd.grad(error.square().mean(), chosen)
    torch.testing.assert_close(at_latents, at_codes)
    (pull,) = torch.autograd.grad(found.commitment, latents)
    torch.testing.assert_close(pull, 2 * (latents - chosen).detach() / latents.numel())
    assert torch.equal(found.codes, vqgan.lookup(latents))


def test_dead_codes_restart_at_latents_of_the_batch():
    vqgan = tiny_vqgan().requires_grad_(False)
    dead = DeadCodes(vqgan, patience=3)
    latents = torch.randn(2, 4, 3, 3)
    drawn = torch.Generator().manual_seed(5)
    assert dead.restart(latents, drawn).tolist() == list(range(16))
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    assert all((rows == code).all(1).any() for code in vqgan.codebook)
    for _ in range(4):
        dead.count(torch.tensor([[[1, 2]]]))
    kept = vqgan.codebook[1:3].clone()
    assert set(dead.restart(latents, drawn).tolist()) == set(range(16)) - {1, 2}
    assert torch.equal(vqgan.codebook[1:3], kept)


def test_codebook_is_the_moving_average_of_its_latents():
    vqgan = tiny_vqgan(n_embed=3, embed_dim=2).requires_grad_(False)
    vqgan.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]]))
    moving = MovingCodebook(vqgan, decay=0.9)
    latents = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]]).T.view(1, 2, 1, 3)
    moving.update(latents, torch.tensor([[[1, 1, 0]]]))
    # m = 0.9 e + 0.1 sum of latents, N = 0.9 + 0.1 count
    expected = torch.tensor([[0.0, 0.3 / 1.0], [(0.9 + 0.6) / 1.1, 0.0], [5.0, 5.0]])
    torch.testing.assert_close(vqgan.codebook.detach(), expected)


def test_perplexity_counts_codes_in_even_use():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([9, 0])) == pytest.approx(1.0)


def test_size_of_training_images_is_recorded(tmp_path):
    vqgan = tiny_vqgan()
    vqgan.image_size = 48
    vqgan.save(tmp_path / "a.safetensors", seen="x")
    assert VQGAN.load(tmp_path / "a.safetensors").image_size == 48
    _, metadata = read_state_dict(tmp_path / "a.safetensors")
    # As before FSQ: earlier versions read such a file.
    assert "quantizer" not in json.loads(metadata["dad_fast.vqgan"])
