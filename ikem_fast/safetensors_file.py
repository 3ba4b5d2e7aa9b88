"""Tensors with a description in one safetensors file: written atomically, read only if whole and of the right kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ikem_fast.atomic import atomic_open


class TensorFileError(ValueError):
    """A file of tensors that is missing, damaged or of another kind; the message names the file and the reason."""


def write(path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], description: Any) -> None:
    """Writes tensors and their description, atomically.

    Args:
        path: the file; its folder must exist.
        kind: what the file is, such as ``"ikem_fast model"``; ``read`` asks for it.
        version: of this kind's form.
        tensors: by name, on any device.
        description: what JSON can hold.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description, allow_nan=False)
    metadata = {"format": kind, "format_version": str(version), "description": text, "sha256": _digest(tensors, text)}
    with atomic_open(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))


def read(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the description of a file of ``write``.

    Raises:
        TensorFileError: it is missing, cut short, changed by a single bit, of another kind, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise TensorFileError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise TensorFileError(f"{path} is damaged or no safetensors file: {str(error).strip()}") from error
    if metadata.get("format") != kind:
        raise TensorFileError(f"{path} must be of the format {kind!r}, got {metadata.get('format')!r}")
    if metadata.get("format_version") != str(version):
        raise TensorFileError(f"{path} must have format version {version}, got {metadata.get('format_version')}")
    text = metadata.get("description", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise TensorFileError(f"{path} is damaged: its content is not what it was written with")
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, Tensor], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
