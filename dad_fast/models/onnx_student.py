"""Exported ONNX classifier, run by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dad_fast.data.augment.view import View
from dad_fast.errors import DataError, EnvironmentProblem
from dad_fast.models.weights.declared import checked_view

# Metadata key of the name, the classes and the evaluation view
VIEW = "dad_fast.view"


class OnnxStudent:
    """Classifier on the CPU: pixels [B, 3, H, W] in [0, 1] -> logits [B, num_classes], float32.

    `metadata` is that of the file.

    Raises EnvironmentProblem without onnxruntime, DataError for a file that is damaged or that
    `dad-fast export` did not write.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise EnvironmentProblem(
                f"{path}: reading it needs onnxruntime: pip install 'dad-fast[export]'"
            ) from None
        options = onnxruntime.SessionOptions()
        # Errors are raised, and warnings would be extra lines on stderr.
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        except Exception as error:
            # onnxruntime has many classes of errors without a common base.
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"{path}: not an ONNX model, or damaged ({reason}): export it again"
            ) from None
        if VIEW not in self.metadata:
            raise DataError(
                f"{path}: not exported by dad-fast (no {VIEW} in its metadata), so its images and "
                "classes are not known"
            )
        try:
            view = checked_view(self.metadata[VIEW])
        except ValueError as error:
            raise DataError(f"{path}: its metadata {VIEW} is damaged ({error})") from None
        self._check_shapes(path, view)
        self.name = view["name"]
        self.num_classes = view["num_classes"]
        self.image_size = view["img_size"]
        self.crop_pct = view["crop_pct"]
        self.interpolation = view["interpolation"]
        self.squashed = view["squashed"]

    @property
    def view(self) -> View:
        """Return the evaluation view that belongs to the weights."""
        return View(self.image_size, self.crop_pct, self.interpolation, self.squashed)

    def _check_shapes(self, path: str | Path, view: dict[str, Any]) -> None:
        tensors = (*self._session.get_inputs(), *self._session.get_outputs())
        found = [(tensor.name, list(tensor.shape)[1:]) for tensor in tensors]
        side = view["img_size"]
        if found != [("pixels", [3, side, side]), ("logits", [view["num_classes"]])]:
            raise DataError(
                f"{path}: damaged: its inputs and outputs differ from its metadata {VIEW}"
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        run: Callable[..., Any] = self._session.run
        return torch.from_numpy(run(["logits"], {"pixels": pixels.numpy()})[0])
