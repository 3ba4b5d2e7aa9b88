"""The form that this package reads again: encoders, heads, preparation and origin in one safetensors file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ikem_fast.export.checks import outputs_of
from ikem_fast.inference import Model, load, save_model

NAME = "model.safetensors"


def write(model: Model, folder: Path, _view: str | None) -> list[Path]:
    """Writes the file and returns its path."""
    path = folder / NAME
    save_model(model, path)
    return [path]


def run(path: Path, clips: Tensor, num_frames: Tensor, view: str | None) -> list[Tensor]:
    """Features and logits of the loaded file, in float32."""
    return outputs_of(load(path, precision="fp32"), clips, num_frames, view)
