"""Evaluation images decoded, resized and cropped by DALI.

Pixels differ slightly from PIL's, so results record the loader. Worker processes plan: they pass on
the bytes of plain JPEGs and make with PIL what DALI does not decode as PIL does. PIL makes a batch
as a whole when DALI fails on it. The mixed back end, which decodes on a GPU, has not yet been run
on one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torch.utils.data import Dataset

from dad_fast.data.augment.execute import eval_size
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.dali.jpeg import is_sound
from dad_fast.data.loaders.dali.loader import FAILURES, built, raise_after_repeated_failures
from dad_fast.data.loaders.dali.pipeline import FILTER_TYPES
from dad_fast.data.loaders.dali.plan import join_files
from dad_fast.data.loaders.loader import EvalBatch, EvalLoader
from dad_fast.data.loaders.workers import iterate
from dad_fast.data.sources.base import Source
from dad_fast.errors import UsageError

log = logging.getLogger("dad_fast.data")


class _Planned(NamedTuple):
    """A batch on its way to DALI: `batch` with PIL's images; DALI fills the other `rows`."""

    batch: EvalBatch
    rows: Tensor  # int64 [n]
    files: Tensor  # uint8, n JPEGs one after the other
    ends: Tensor  # int64 [n], end of each JPEG in `files`
    sizes: Tensor  # int32 [n, 4], height and width after resizing, top and left of the crop

    def pin_memory(self) -> _Planned:
        return self._replace(batch=self.batch.pin_memory())


class _Plans(Dataset[_Planned]):
    """Batch number -> _Planned."""

    def __init__(self, batches: Any, source: Source, view: View) -> None:
        self.batches, self.source, self.view = batches, source, view

    def __getitem__(self, number: int) -> _Planned:
        files: dict[int, bytes] = {}

        def skip(row: int, sample: int) -> bool:
            # A view that pads is left to PIL.
            if self.view.crop_pct > 1:
                return False
            data = self.source.encoded(sample)
            if data is None or not is_sound(data, *(int(x) for x in self.source.sizes[sample])):
                return False
            files[row] = data
            return True

        batch = self.batches.made(number, skip)
        shapes = [self.source.sizes[int(batch.samples[row])] for row in files]
        side, crop_pct, _, squashed = self.view
        places = [
            eval_size(int(width), int(height), side, crop_pct, squashed) for width, height in shapes
        ]
        sizes = [[height, width, top, left] for (width, height), (left, top) in places]
        return _Planned(
            batch=batch,
            rows=torch.tensor(list(files), dtype=torch.int64),
            files=join_files(list(files.values())),
            ends=torch.tensor(list(map(len, files.values())), dtype=torch.int64).cumsum(0),
            sizes=torch.tensor(sizes, dtype=torch.int32),
        )


class DaliEvalLoader(EvalLoader):
    """An `EvalLoader` whose plain JPEGs DALI decodes, resizes and crops.

    device: of the returned images; on CUDA the decoder is the mixed one.

    `failed_over` counts the batches that PIL made because DALI failed on them.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
        workers: int,
        pin_memory: bool = False,
        *,
        device: torch.device,
    ) -> None:
        super().__init__(source, view, batch_size, workers, pin_memory)
        if view.interpolation not in FILTER_TYPES:
            known = ", ".join(FILTER_TYPES)
            raise UsageError(
                f"--interpolation {view.interpolation}: DALI resizes with {known}; use --loader pil"
            )
        self.source = source
        self.view = view
        self.batch_size = batch_size
        self.device = device
        self.failed_over = 0

    def __iter__(self) -> Iterator[EvalBatch]:
        pipeline = self._pipeline()
        plans = _Plans(self._batches, self.source, self.view)
        in_a_row = 0
        batches = iterate(plans, range(len(self)), self.workers, self.pin_memory)
        for number, planned in enumerate(batches):
            if not len(planned.rows):
                yield planned.batch
                continue
            try:
                batch = planned.batch._replace(images=self._images(pipeline, planned))
                in_a_row = 0
            except FAILURES as error:
                # Raises DecodeError when the file is the cause.
                batch = self._batches[number]
                self.failed_over += 1
                in_a_row += 1
                why = " ".join(str(error).split())[:200]
                raise_after_repeated_failures(in_a_row, why)
                if self.failed_over == 1:
                    log.warning(
                        "%s: DALI could not make batch %d; PIL makes it and later failures (%s)",
                        self.source.name,
                        number,
                        why,
                    )
                pipeline = self._pipeline()
            yield batch

    def _images(self, pipeline: Any, planned: _Planned) -> Tensor:
        pipeline.feed_input("files", np.split(planned.files.numpy(), planned.ends[:-1].tolist()))
        pipeline.feed_input("size", np.ascontiguousarray(planned.sizes[:, :2], dtype=np.float32))
        pipeline.feed_input("start", np.ascontiguousarray(planned.sizes[:, 2:]))
        (found,) = pipeline.run()
        made = torch.from_dlpack(found.as_tensor()).permute(0, 3, 1, 2)
        images = planned.batch.images.to(made.device, copy=True)
        images[planned.rows.to(made.device)] = made
        return images

    def _pipeline(self) -> Any:
        mixed = self.device.type == "cuda"
        return built(
            _view,
            img_size=self.view.image_size,
            filter=FILTER_TYPES[self.view.interpolation],
            device="mixed" if mixed else "cpu",
            batch_size=self.batch_size,
            num_threads=max(1, self.workers),
            device_id=self.device.index or 0 if mixed else None,
            exec_async=False,
            exec_pipelined=False,
        )


@pipeline_def
def _view(img_size: int, filter: Any, device: str) -> Any:
    """Make uint8 [img_size, img_size, 3] of each JPEG.

    Inputs: size, height and width after resizing; start, top and left of the crop.
    """
    files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
    size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    images = fn.decoders.image(
        files,
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        use_fast_idct=False,
    )
    images = fn.resize(images, size=size, interp_type=filter, antialias=True)
    return fn.slice(images, start=start, shape=[img_size, img_size], axes=[0, 1])
