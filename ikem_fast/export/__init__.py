"""Export of trained models: as one safetensors file, as plain PyTorch, and as ONNX, each checked against the model."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ikem_fast.atomic import sync_folder

if TYPE_CHECKING:
    from ikem_fast.inference import Model
    from ikem_fast.inference.model import Clips

# By name the module with ``write`` and ``run``.
_FORMS = {"safetensors": "safetensors_form", "plain": "plain", "onnx": "onnx_model"}
FORMATS = tuple(_FORMS)

__all__ = ["FORMATS", "export_model"]


def export_model(
    model: Model,
    folder: str | Path,
    formats: Sequence[str] = ("safetensors", "plain"),
    *,
    view: str | None = None,
    clips: Clips | None = None,
) -> dict[str, tuple[Path, float]]:
    """Writes a model in some forms, once each has been shown to compute what the model does.

    - ``safetensors``: ``model.safetensors``, all of the model; ``ikem_fast.load`` reads it.
    - ``plain``: ``model.py`` and ``model.pt``, which need torch and numpy alone.
    - ``onnx``: ``model.onnx``, which needs no Python. Packages of the extra ``export`` write it.

    Args:
        model: what ``ikem_fast.load`` gave.
        folder: made if it does not exist; files of an earlier export are replaced.
        formats: some of ``FORMATS``.
        view: whose logits the ONNX file gives; by default the fullest.
        clips: recordings to compare on beside random clips, as for ``Model.embed``; the first 64 are taken.

    Returns:
        By form its file, and the largest difference from the model as a share of the largest number of a modality's
        features or of the logits.

    Raises:
        ModelError: nobody knows the model's preparation; a package is missing; or a form computes something else, and
            then no file is written.
        ValueError: an unknown format or view.
        DataError: a recording cannot be used.
        OSError: the folder cannot be written to.
    """
    from ikem_fast.export import checks
    from ikem_fast.inference import ModelError

    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}")
    if model.preparation is None:
        raise ModelError("the model does not know how its data set was prepared: load it with data=, the set's folder")
    if view is not None:
        model.modalities_of(view)  # raises where there is no such view
    tests = [checks.random_clips(model)]
    if clips is not None:
        tests.append(checks.recordings_of(model, clips))
    reference = checks.in_float32(model)
    wanted = [checks.outputs_of(reference, *test, view) for test in tests]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written, result = [], {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as beside:
        for name in formats:
            form = importlib.import_module(f"{__name__}.{_FORMS[name]}")
            files = form.write(model, Path(beside), view)
            differences = [
                checks.largest_difference(form.run(files[0], *test, view), outputs)
                for test, outputs in zip(tests, wanted, strict=True)
            ]
            if max(differences) > checks.TOLERANCE:
                raise ModelError(
                    f"{files[0].name} must differ from the model by at most {checks.TOLERANCE:g} of its largest "
                    f"number, got {max(differences):.1e}: it was not written"
                )
            written += files
            result[name] = (folder / files[0].name, max(differences))
        for file in written:
            os.replace(file, folder / file.name)
        sync_folder(folder)
    return result
