"""The plain-PyTorch form of a model: one readable Python file and its weights, which need torch and numpy alone."""

from __future__ import annotations

import pprint
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ikem_fast
from ikem_fast import modalities as modality_registry
from ikem_fast.atomic import atomic_open
from ikem_fast.data.preprocess import prepare_recordings
from ikem_fast.export.plain_model import PlainModel
from ikem_fast.export.source import bundle
from ikem_fast.inference import Model, ModelError

NAME = "model.py"

_TEMPLATE = '''"""A trained model of human actions from skeletons of the layout '{layout_name}'.

Made by ikem_fast {version}, of whose source (MIT license) this file is a part. It needs torch, numpy and its weights,
``{weights}``, beside it:

    model = load()
    clips, num_frames = prepare([recording])  # arrays (3, F, V, M) in metres
    {usage}
"""

from __future__ import annotations

{definitions}

LAYOUT = {layout}
MODALITIES = {modalities}
SIZES = {sizes}
PREPARATION = {preparation}
CLASS_NAMES = {class_names}


def load(weights: str | Path | None = None) -> PlainModel:
    """The model on the CPU, in eval mode, with the weights in a file, by default those beside this one."""
    model = PlainModel(LAYOUT, MODALITIES, **SIZES)
    weights = Path(__file__).with_name("{weights}") if weights is None else weights
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def prepare(recordings: Iterable[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Clips and frame counts of recordings (3, F, V, M) in metres, prepared as those the model was trained on."""
    clips, num_frames = prepare_recordings(recordings, LAYOUT, **PREPARATION)
    return torch.from_numpy(clips), torch.from_numpy(num_frames)
'''

# In a process of its own, which finds no ikem_fast.
_RUN = """
import importlib.util, sys
import numpy as np, torch
sys.modules["ikem_fast"] = None
path, given, out, *view = sys.argv[1:]
spec = importlib.util.spec_from_file_location("exported_model", path)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
given = np.load(given)
torch.set_num_threads(int(given["threads"]))
with torch.inference_mode():
    outputs = module.load()(torch.from_numpy(given["clips"]), torch.from_numpy(given["num_frames"]), *view)
np.savez(out, *[output.numpy() for output in outputs])
"""

_IMPORTS = (
    "import numpy as np",
    "import torch",
    "from torch import Tensor",
    "from collections.abc import Iterable",
    "from pathlib import Path",
)


def plain_model(model: Model) -> PlainModel:
    """A model's encoders and heads in plain PyTorch, on the CPU, in float32; the weights are copied."""
    encoders = model.encoders
    plain = PlainModel(
        encoders.layout, {name: modality_registry.get(name) for name in encoders.modalities}, **_sizes(model)
    )
    with torch.no_grad():
        for stream, encoder in enumerate(plain.encoders):
            encoder.load_state_dict(encoders.encoders.stream_tensors(stream))
        for number, view in enumerate(model.views):
            plain.weights[number].copy_(model.heads.weights[view])
            plain.biases[number].copy_(model.heads.biases[view])
    return plain


def _sizes(model: Model) -> dict[str, Any]:
    encoders = model.encoders
    return {
        "hidden_channels": encoders.hidden_channels,
        "feature_size": encoders.feature_size,
        "views": model.views,
        "num_classes": len(model.class_names),
        "chest_normal": encoders.chest_normal,
        "early_fusion": encoders.early_fusion,
        "distance_limit": 1 if encoders.quirks.one_hop_graph else None,
    }


def write(model: Model, folder: Path, _view: str | None) -> list[Path]:
    """Writes the Python file and the weights it loads, and returns their paths."""
    path = folder / NAME
    weights = path.with_suffix(".pt")
    with atomic_open(weights, "wb") as file:
        torch.save(plain_model(model).state_dict(), file)
    with atomic_open(path) as file:
        file.write(_text(model, weights.name))
    return [path, weights]


def run(path: Path, clips: Tensor, num_frames: Tensor, view: str | None) -> list[Tensor]:
    """Features and logits of the Python file, in a process that cannot import this package.

    Raises:
        ModelError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "given.npz", Path(folder) / "out.npz"
        np.savez(given, clips=clips.numpy(), num_frames=num_frames.numpy(), threads=torch.get_num_threads())
        command = [sys.executable, "-c", _RUN, str(path.resolve()), str(given), str(out), *([view] if view else [])]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(f"{path.name} does not run: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        with np.load(out) as file:
            return [torch.from_numpy(file[name]) for name in file.files]


def _text(model: Model, weights: str) -> str:
    functions = {name: "derive_" + re.sub(r"\W", "_", name) for name in model.encoders.modalities}
    roots = {function: modality_registry.get(name) for name, function in functions.items()}
    usage = "(features,) = model(clips, num_frames)"
    if model.heads is not None:
        usage = "features, logits = model(clips, num_frames)\n    actions = [CLASS_NAMES[i] for i in logits.argmax(1)]"
    preparation = {
        "num_frames": model.preparation.num_frames,
        "num_persons": model.preparation.num_persons,
        "with_centre": model.preparation.centring,
        "with_rotation": model.preparation.rotation,
        "file_frame_count": model.encoders.quirks.file_frame_count,
    }
    return _TEMPLATE.format(
        layout_name=model.layout.name,
        version=ikem_fast.__version__,
        weights=weights,
        usage=usage,
        definitions=bundle({"prepare_recordings": prepare_recordings, **roots, "PlainModel": PlainModel}, _IMPORTS),
        layout=_call("Layout", vars(model.layout)),
        modalities=_lines("{", (f"{name!r}: {function}" for name, function in functions.items()), "}"),
        sizes=_call("dict", _sizes(model)),
        preparation=_call("dict", preparation),
        class_names=_lines("(", map(repr, model.class_names), ")"),
    )


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    """``name(argument=value, ...)``, an argument a line."""
    lines = []
    for argument, value in arguments.items():
        first, *more = pprint.pformat(value, width=100, compact=True, sort_dicts=False).split("\n")
        indent = " " * (len(argument) + 1)
        lines.append("\n    ".join([f"{argument}={first}", *(indent + line for line in more)]))
    return _lines(f"{name}(", lines, ")")


def _lines(begin: str, lines: Iterable[str], end: str) -> str:
    return "\n".join([begin, *(f"    {line}," for line in lines), end])
