"""Join stores to the stream of batches, and check that they fit the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dad_fast.config.schema import AugmentConfig, Config
from dad_fast.data.augment.records import uses_mixing
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import Batch
from dad_fast.data.sources.base import Source
from dad_fast.errors import DataError, UsageError
from dad_fast.methods.registry import DISTANCES, METHODS
from dad_fast.store import AdversarialStore, Manifest, Store, TargetStore, open_store

# Settings of [augment].
MIXING = ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob")
# Batches that the thread joins ahead of the step.
AHEAD = 2


class Stored:
    """Stores of a run, at most one of each kind, read by a thread while the step runs.

    adversarial: Q(x') and the teacher's outputs on it; view v serves the epochs e = v mod its
    number of views.
    targets: the teacher's outputs on clean views; the loader then cycles through these views
    (`TrainLoader.cycle`).
    """

    def __init__(self, dirs: Sequence[str], source: Source, filtered: bool = True) -> None:
        """Open the stores in `dirs`.

        filtered: count an adversarial image only if the teacher still predicts the label.
        Raises DataError for a store that is damaged, incomplete or of other classes or images,
        UsageError for two stores of one kind.
        """
        self.adversarial: AdversarialStore | None = None
        self.targets: TargetStore | None = None
        for folder in dirs:
            store = open_store(folder)
            name = "adversarial" if isinstance(store, AdversarialStore) else "targets"
            if getattr(self, name) is not None:
                raise UsageError(
                    f"--store {folder}: a second store of kind {store.kind}; give one of each kind"
                )
            _check_classes(store, source)
            setattr(self, name, store)
        self._source = source
        self._filtered = filtered
        self._rows: dict[tuple[str, int], np.ndarray] = {}

    @property
    def stores(self) -> list[Store]:
        """List the open stores."""
        return [store for store in (self.adversarial, self.targets) if store is not None]

    @property
    def cycle(self) -> int:
        """Number of epochs after which the clean views repeat; 0 = never."""
        return self.targets.num_views if self.targets is not None else 0

    def view_seed(self, seed: int) -> int:
        """Return the seed of clean views: that of stored targets, so that one store serves students
        of any seed.
        """
        return int(self.targets.manifest.settings["seed"]) if self.targets is not None else seed

    @property
    def checksums(self) -> dict[str, str]:
        """Checksum of each store by its kind."""
        return {store.kind: store.checksum for store in self.stores}

    def check_form(self, cfg: Config) -> None:
        """Check that the stores contain what the loss needs.

        Raises UsageError for a store that is missing or useless, DataError for outputs of another
        temperature.
        """
        method = METHODS[cfg.method]
        distance = DISTANCES[cfg.loss.distance]
        useful = method.store_kinds
        for store in self.stores:
            if store.kind not in useful:
                clean = "outputs on clean images"
                what = "stored adversarial images" if store is self.adversarial else clean
                raise UsageError(
                    f"--store {store.folder}: --method {cfg.method} learns from no {what}; leave "
                    "it out"
                )
            form = store.manifest.outputs_form
            if form.k and method.takes_distance and not distance.uses_temperature:
                raise UsageError(
                    f"--store {store.folder}: --distance {cfg.loss.distance} compares the logits "
                    f"of all classes, and it has {form}; store full outputs"
                )
            if form.k and form.temperature != cfg.loss.temperature:
                raise DataError(
                    f"--store {store.folder}: its outputs, {form}, are exact at temperature "
                    f"{form.temperature:g} only, and the run "
                    f"distils at {cfg.loss.temperature:g} (--temperature); use the same, or store "
                    "full outputs"
                )
        joint = cfg.loss.form == "joint"
        if joint and self.adversarial is None:
            raise UsageError(
                "--loss-form joint learns from stored adversarial images, and no store contains "
                "any: add one to --store"
            )
        if cfg.store.mix_outputs and self.targets is None:
            raise UsageError(
                "--mix-outputs mixes stored outputs on clean images, and no store contains any: "
                "add one made with --targets"
            )
        unmixed_targets = self.targets is not None and not cfg.store.mix_outputs
        if joint and unmixed_targets and uses_mixing(cfg.augment):
            raise UsageError(
                "--loss-form joint mixes clean with adversarial images, and no store contains "
                "outputs on such mixes: add --mix-outputs, "
                "which mixes those on the unmixed images (an approximation), or leave out the "
                "store of --targets and give --teacher"
            )

    def check_run(
        self,
        img_size: int,
        augment: AugmentConfig,
        hashes: dict[str, str | None],
        mix_outputs: bool = False,
    ) -> None:
        """Check that the stores were made for the run's image size, augmentation and models. Raises
        DataError.

        hashes: of the loaded models. mix_outputs: the run mixes stored outputs of unmixed views.
        """
        for store in self.stores:
            manifest = store.manifest
            for name, value in hashes.items():
                recorded = manifest.hashes.get(name)
                if value and recorded and value != recorded:
                    raise DataError(
                        f"--store {store.folder}: made with another {name} ({recorded[:12]}…) "
                        f"than the run's ({value[:12]}…){_same_members(name, hashes, manifest)}"
                    )
        if self.adversarial is not None:
            stored_size = self.adversarial.manifest.settings["images"]["img_size"]
            if stored_size != img_size:
                raise DataError(
                    f"--store {self.adversarial.folder}: images of {stored_size} px, but the "
                    f"student sees {img_size} (--img-size)"
                )
        if self.targets is not None:
            self._check_views(self.targets, img_size, augment, mix_outputs)

    def _check_views(
        self, targets: TargetStore, img_size: int, augment: AugmentConfig, mix_outputs: bool
    ) -> None:
        """Check that stored outputs on clean images are of the run's views. Raises DataError."""
        settings = targets.manifest.settings
        # Settings that are newer than the store had their default.
        theirs = view_settings(AugmentConfig()) | settings["augment"]
        theirs |= {"img_size": settings["img_size"]}
        ours = view_settings(augment) | {"img_size": img_size}
        if mix_outputs:
            their_mixing = {name: theirs.get(name, 0.0) for name in MIXING}
            if uses_mixing(replace(augment, **their_mixing)):
                mixed = ", ".join(f"{name} {theirs.get(name)}" for name in ("mixup", "cutmix"))
                raise DataError(
                    f"--mix-outputs: --store {targets.folder} has outputs on mixed views "
                    f"({mixed}); make one without"
                )
            ours = {name: value for name, value in ours.items() if name not in MIXING}
        changed = [
            f"{name}: {theirs[name]} in the store, {ours[name]} here"
            for name in ours
            if theirs.get(name) != ours[name]
        ]
        if changed:
            raise DataError(
                f"--store {targets.folder}: its teacher saw other views: {'; '.join(changed)}; "
                "use the same settings"
            )

    def join(self, batches: Iterator[Batch], pin_memory: bool) -> Iterator[Batch]:
        """Add stored images and outputs to `batches`, in order."""
        if not self.stores:
            return batches
        return _ahead(self._joined(batch, pin_memory) for batch in batches)

    def _joined(self, batch: Batch, pin_memory: bool) -> Batch:
        samples = batch.samples.cpu().numpy()
        found: dict[str, np.ndarray] = {}
        images: dict[str, torch.Tensor] = {}
        if self.adversarial is not None:
            store = self.adversarial
            view = batch.epoch % store.num_views
            rows = self._rows_of(store, view)[samples]
            counts = store.kept(rows, view) if self._filtered else store.readable(rows, view)
            found |= {
                "dad_outputs": store.outputs(rows, view),
                "dad_kept": counts.astype(np.float32),
            }
            if store.manifest.images != "none":
                # Read straight into pinned memory; torch reuses it once the device has read it.
                pixels = torch.empty(
                    len(rows),
                    *store.manifest.image_size,
                    3,
                    dtype=torch.uint8,
                    pin_memory=pin_memory,
                )
                store.images(rows, view, out=pixels.numpy())
                images["dad_images"] = pixels.permute(0, 3, 1, 2)
            else:
                found["dad_codes"] = store.codes(rows, view)
        if self.targets is not None:
            view = batch.epoch % self.targets.num_views
            assert batch.drawn is not None
            rows = self._rows_of(self.targets, view)[batch.drawn.cpu().numpy()]
            found["clean_outputs"] = self.targets.outputs(rows, view)
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()
        }
        if pin_memory:
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(batch, **tensors, **images)

    def _rows_of(self, store: Store, view: int) -> np.ndarray:
        """Return the row of each sample of the source, int64 [N]; each view of targets has its own
        order.
        """
        view = view if isinstance(store, TargetStore) else 0
        if (store.kind, view) not in self._rows:
            self._rows[store.kind, view] = store.rows(self._source, view)
        return self._rows[store.kind, view]


def recorded_classes(dirs: Sequence[str]) -> ClassMap | None:
    """Return the class list of the first store; None without a store."""
    return Manifest.load(Path(dirs[0])).class_map if dirs else None


def view_settings(augment: AugmentConfig) -> dict[str, Any]:
    """Return the settings that determine the pixels of an augmented, mixed view, as a manifest
    holds them.
    """
    other = {"img_size", "smoothing", "crop_pct", "interpolation"}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(augment).items()
        if name not in other
    }


def _same_members(name: str, hashes: dict[str, str | None], manifest: Manifest) -> str:
    """Return why two ensembles differ whose members are the same; empty for other models."""
    own = {key: value for key, value in hashes.items() if key.startswith(f"{name} ")}
    if not own or not own.items() <= manifest.hashes.items():
        return ""
    return "; its members are the same, their weights, average or --temperature are not"


def _check_classes(store: Store, source: Source) -> None:
    """Check that a store has the classes, images and labels of the run's data. Raises DataError."""
    theirs, ours = store.manifest.class_map, source.classes
    if theirs.folders != ours.folders:
        differing = [
            f"{i}: {a} there, {b} here"
            for i, (a, b) in enumerate(zip(theirs.folders, ours.folders, strict=False))
            if a != b
        ]
        what = differing[0] if differing else f"{len(theirs)} there, {len(ours)} here"
        raise DataError(
            f"--store {store.folder}: its classes are not the run's (class {what}); give the same "
            "--class-map"
        )
    labels = store.labels(store.rows(source))
    if not np.array_equal(labels, source.labels):
        first = int(np.flatnonzero(labels != source.labels)[0])
        raise DataError(
            f"--store {store.folder}: {source.keys[first]} has another label there; it was made "
            "from other data"
        )


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield `batches`, prefetched by a thread.

    Raises the thread's exceptions; closing the iterator ends the thread.
    """
    made: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
    closed = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            # Raised in the training thread.
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="stores")
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
