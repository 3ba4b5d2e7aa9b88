"""The ONNX form of a model: clips and their frame counts to features and logits, for any number of clips."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ikem_fast
from ikem_fast.atomic import atomic_open
from ikem_fast.export.plain import plain_model
from ikem_fast.export.plain_model import PlainModel
from ikem_fast.inference import Model, ModelError

NAME = "model.onnx"
# What torch's exporter and the check of its result need; the extra ``export``.
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def _require() -> None:
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ModelError(
                f"the ONNX export needs {', '.join(_NEEDED)}: pip install 'ikem_fast[export]' ({error})"
            ) from error


def write(model: Model, folder: Path, view: str | None) -> list[Path]:
    """Writes the file and returns its path.

    Inputs are ``clips`` (N, 3, T, V, M) float32 and ``num_frames`` (N,) int64, outputs ``features`` (S, N, d) and, of a
    model with heads, ``logits`` (N, classes) of the view. N is free; T, V and M are those of the model's preparation.
    The file's metadata holds the names of modalities and classes, the skeleton and the preparation, as JSON.

    Raises:
        ModelError: a package for it is missing.
    """
    path = folder / NAME
    _require()
    import onnx

    view = view if view is not None or not model.views else list(model.views)[-1]
    shape = (3, model.preparation.num_frames, model.layout.num_joints, model.preparation.num_persons)
    number = torch.export.Dim("number")
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _OfView(plain_model(model), view),
            (torch.randn(2, *shape), torch.tensor([40, 60])),
            dynamo=True,
            input_names=["clips", "num_frames"],
            output_names=["features", "logits"] if model.views else ["features"],
            dynamic_shapes={"clips": {0: number}, "num_frames": {0: number}},
            verbose=False,
        )
    file = program.model_proto
    file.producer_name, file.producer_version = "ikem_fast", ikem_fast.__version__
    described = {
        "modalities": list(model.names),
        "view": view,
        "class_names": list(model.class_names),
        "layout": model.layout.to_dict(),
        "preparation": model.preparation.to_dict(),
        "file_frame_count": model.encoders.quirks.file_frame_count,
    }
    onnx.helper.set_model_props(file, {name: json.dumps(value) for name, value in described.items()})
    with atomic_open(path, "wb") as out:
        out.write(file.SerializeToString())
    return [path]


class _OfView(nn.Module):
    """A plain model whose view is chosen."""

    def __init__(self, model: PlainModel, view: str | None) -> None:
        super().__init__()
        self.model = model
        self.view = view

    def forward(self, clips: Tensor, num_frames: Tensor) -> tuple[Tensor, ...]:
        return self.model(clips, num_frames, self.view)


def run(path: Path, clips: Tensor, num_frames: Tensor, _view: str | None) -> list[Tensor]:
    """Features and logits as onnxruntime computes them on the CPU, the first clip alone and then the others."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = [
        session.run(None, {"clips": clips[rows].numpy(), "num_frames": num_frames[rows].numpy()})
        for rows in (slice(0, 1), slice(1, None))
        if len(clips[rows])
    ]
    return [torch.from_numpy(np.concatenate(outputs, axis=-2)) for outputs in zip(*parts, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages of operators that are not there and on names of axes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
