"""Stores: training steps fed by them against plain distillation, the cost of filling them, and the
total.

A thread joins stored rows to batches, so the steps exclude this; group `store` has its throughput.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.bench import Bench
from benchmarks.timm_kd import kd_baseline
from benchmarks.workload import Workload, make_workload
from dad_fast.data.augment.mixing import mix, to_pixels
from dad_fast.data.loaders.loader import Batch
from dad_fast.kernels import pack_codes
from dad_fast.methods.attack import PGD
from dad_fast.precompute.adversarial import adversarial


def test_stored(bench: Bench) -> None:
    work = make_workload(bench.size, bench.device, bench.session.batch_size)
    f = work.flops.of
    student, teacher, gradient, encode, decode = (
        f[name] for name in ("student", "teacher", "teacher_gradient", "encode", "decode")
    )
    baseline, plain = kd_baseline(work)
    images, no_teacher, codes, targets = stored_batches(work)
    functions: dict[str, tuple[Callable[[], object], float]] = {
        baseline: (plain, student + teacher),
        "kd": (step_on(work, "kd", work.batch), student + teacher),
        "kd, stored outputs": (step_on(work, "kd", targets), student),
        "dad": (
            step_on(work, "dad", work.batch),
            2 * student + 2 * teacher + gradient + encode + decode,
        ),
        "dad, stored images": (step_on(work, "dad", images), 2 * student + teacher),
        "dad, stored images and outputs": (step_on(work, "dad", no_teacher), 2 * student),
        "dad, stored codes": (step_on(work, "dad", codes), 2 * student + teacher + decode),
        "filling: adversarial images": (
            lambda: filled(work),
            teacher + gradient + 2 * encode + decode,
        ),
        "filling: outputs of a view": (lambda: targeted(work), teacher),
    }
    bench.compare(
        f"batch {len(work.batch.labels)}",
        {name: function for name, (function, _) in functions.items()},
        baseline=baseline,
        work=len(work.batch.labels),
        config=work.describe(),
        flops={name: count for name, (_, count) in functions.items()},
        energy=True,
        seconds=30,
    )


def step_on(work: Workload, method: str, batch: Batch) -> Callable[[], object]:
    step = work.step(work.with_method(method))
    return lambda: step(batch, 10, work.cfg.optim.lr)


def stored_batches(work: Workload) -> tuple[Batch, Batch, Batch, Batch]:
    """Return the workload's batch with stored images; images and clean outputs; codes; clean
    outputs alone.
    """
    found = filled(work)
    outputs, kept = found.outputs.half(), found.kept.float()
    images = dataclasses.replace(
        work.batch, dad_images=found.images, dad_outputs=outputs, dad_kept=kept
    )
    assert found.codes is not None
    packed = pack_codes(found.codes.flatten(1), work.discretizer.vqgan.config.code_bits)
    codes = dataclasses.replace(work.batch, dad_codes=packed, dad_outputs=outputs, dad_kept=kept)
    clean = targeted(work).half()
    return (
        images,
        dataclasses.replace(images, clean_outputs=clean),
        codes,
        dataclasses.replace(work.batch, clean_outputs=clean),
    )


def filled(work: Workload):
    batch, cfg = work.batch, work.cfg
    attack = PGD.from_config(cfg.attack)
    return adversarial(
        work.teacher,
        work.discretizer,
        attack,
        cfg.attack.order,
        batch.images,
        batch.labels,
        batch.seeds,
        work.num_classes,
    )


@torch.no_grad()
def targeted(work: Workload) -> torch.Tensor:
    batch = work.batch
    mixed = mix(
        to_pixels(batch.images),
        batch.labels,
        batch.mix_kind,
        batch.mix_lam,
        batch.mix_box,
        work.num_classes,
    )
    return work.teacher(mixed.pixels)
