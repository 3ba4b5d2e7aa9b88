"""Exported models: each form computes what the model does, without this package where it says so."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from evaluation_helpers import small_ikem

import ikem_fast
from ikem_fast import modalities
from ikem_fast.data import readers
from ikem_fast.data.preparation import Preparation
from ikem_fast.evaluation.heads import LinearHeads
from ikem_fast.export import checks, export_model, plain
from ikem_fast.export.__main__ import main
from ikem_fast.export.plain import plain_model
from ikem_fast.export.source import SourceError, bundle
from ikem_fast.inference import FrozenEncoders, Model, ModelError
from ikem_fast.methods import RelationalDistillation
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops.derive_modalities import _derive_with_functions
from ikem_fast.quirks import Quirks


@pytest.fixture(scope="module")
def model(trained_runs):
    return ikem_fast.load(trained_runs.student)


@pytest.fixture(scope="module")
def exported(trained_runs, model, tmp_path_factory):
    """The folder, and what was returned."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    return folder, export_model(model, folder, clips=trained_runs.raw)


def test_forms_are_the_model(exported):
    folder, result = exported
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "model.py", "model.safetensors"]
    assert result["safetensors"] == (folder / "model.safetensors", 0.0)
    path, difference = result["plain"]
    assert path == folder / "model.py"
    assert difference < 1e-5


# From recordings to classes with torch and numpy alone.
USE_PLAIN = """
import sys
sys.modules["ikem_fast"] = None
import numpy as np
import model as exported
model = exported.load()
with np.load("recordings.npz") as file:
    recordings = [file[name] for name in file.files]
clips, num_frames = exported.prepare(recordings)
outputs = {f"{view} {name}": value for view in model.views
           for name, value in zip(("features", "logits"), model(clips, num_frames, view))}
names = [exported.CLASS_NAMES[number] for number in outputs["all logits"].argmax(dim=1)]
assert not [name for name in sys.modules if name.startswith("ikem_fast.")]
np.savez("outputs.npz", names=names, **outputs)
"""


def test_plain_form_goes_from_recordings_to_classes_without_the_package(trained_runs, model, exported, tmp_path):
    folder, _ = exported
    for name in ("model.py", "model.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    paths = sorted(trained_runs.raw.glob("*.skeleton"))[:6]
    recordings = [readers.get("synthetic").read(path, model.layout) for path in paths]
    np.savez(tmp_path / "recordings.npz", *recordings)
    subprocess.run([sys.executable, "-c", USE_PLAIN], cwd=tmp_path, check=True)
    outputs = np.load(tmp_path / "outputs.npz")
    for view in model.views:
        result = model.classify(paths, view=view)
        np.testing.assert_allclose(outputs[f"{view} features"], model.embed(paths).features, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(outputs[f"{view} logits"], result.logits, rtol=1e-4, atol=1e-5)
    assert outputs["names"].tolist() == [classes[0][0] for classes in model.classify(paths).top(1)]


def test_plain_form_is_readable_and_whole(exported):
    text = (exported[0] / "model.py").read_text()
    tree = ast.parse(text)
    imported = {node.names[0].name if isinstance(node, ast.Import) else node.module for node in tree.body
                if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    roots = {name.partition(".")[0] for name in imported}
    assert roots - sys.stdlib_module_names == {"torch", "numpy"}
    assert max(map(len, text.splitlines())) <= 120
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert len(defined) == len(set(defined))
    assert {"PlainModel", "STGCNReference", "derive_angular_velocity", "prepare_clip", "load", "prepare"} <= set(
        defined
    )
    # Nothing that this model does not need.
    assert not {"derive_motion", "from_yaml", "names"} & set(defined)
    assert "four" not in ast.get_docstring(tree)
    assert "actions = [CLASS_NAMES[i]" in ast.get_docstring(tree)


@pytest.mark.parametrize("early_fusion", [False, True])
@pytest.mark.parametrize("names", [("joint", "motion", "bone"), MODALITIES])
def test_plain_model_with_every_quirk(early_fusion, names):
    torch.manual_seed(0)
    quirks = Quirks(early_fusion_student=early_fusion, one_hop_graph=not early_fusion)
    teacher = small_ikem("utd-mhad", modalities=names, quirks=quirks)
    for method, part in ((teacher, None), (RelationalDistillation.from_teacher(teacher), "student")):
        encoders = FrozenEncoders.of_method(method, part)
        rows = encoders.feature_names
        views = {"all": rows, rows[-1]: rows[-1:]} if len(rows) > 1 else {rows[0]: rows}
        weights = {view: 1e6 * torch.randn(len(members), 3, 8) for view, members in views.items()}
        biases = {view: torch.randn(len(members), 3) for view, members in views.items()}
        heads = LinearHeads(("a", "b", "c"), views, weights, biases, {})
        model = Model(encoders, Preparation("ntu-rgb+d", 12, 2, True, True), heads, {})
        clips, num_frames = checks.random_clips(model)
        for view in views:
            outputs = plain_model(model)(clips, num_frames, view)
            assert checks.largest_difference(list(outputs), checks.outputs_of(model, clips, num_frames, view)) < 1e-5
        with pytest.raises(ValueError, match=r"view must be one of .*, got 'elbow'"):
            plain_model(model)(clips, num_frames, "elbow")


def test_a_model_without_heads_gives_features(trained_runs, tmp_path, capsys):
    assert main([str(trained_runs.teacher), str(tmp_path / "out"), "--formats", "safetensors"]) == 0
    captured = capsys.readouterr()
    assert "note: features alone are exported" in captured.err
    assert "model.safetensors  largest relative difference from the model" in captured.out
    model = ikem_fast.load(tmp_path / "out" / "model.safetensors")
    assert model.names == ("joint", "bone", "angular_velocity")
    with pytest.raises(ModelError, match="was exported without linear heads"):
        model.classify(trained_runs.raw)
    with pytest.raises(ValueError, match="the model has no linear heads"):
        plain_model(model).logits(torch.zeros(3, 1, 8))


def test_a_model_in_bfloat16_is_exported_in_float32(trained_runs, tmp_path):
    model = ikem_fast.load(trained_runs.student, precision="bf16")
    result = export_model(model, tmp_path, ["safetensors"])
    assert result["safetensors"][1] == 0.0
    assert ikem_fast.load(tmp_path / "model.safetensors").encoders.precision == "bf16"


def test_a_form_that_differs_is_not_written(model, exported, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in exported[0].iterdir()}
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in before.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(
        plain, "run", lambda path, *test: [1.001 * output for output in checks.outputs_of(model, *test)]
    )
    with pytest.raises(ModelError, match=r"model\.py must differ from the model by at most 0\.0001 .* got 1\.0e-03"):
        export_model(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_form_that_does_not_run_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "_TEMPLATE", plain._TEMPLATE + "\nimport ikem_fast\n")
    with pytest.raises(ModelError, match=r"model\.py does not run: .*ikem_fast"):
        export_model(model, tmp_path, ["plain"])
    assert list(tmp_path.iterdir()) == []


def test_largest_difference():
    wanted = [torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]]]), torch.tensor([[4.0]])]
    other = [torch.tensor([[[1.0, 2.5]], [[10.0, 20.0]]]), torch.tensor([[4.0]])]
    assert checks.largest_difference(wanted, wanted) == 0
    assert checks.largest_difference(other, wanted) == pytest.approx(0.25)
    assert checks.largest_difference(wanted[:1], wanted) == float("inf")
    assert checks.largest_difference([wanted[0], torch.tensor([[torch.nan]])], wanted) == float("inf")


def test_mistakes_are_one_line(trained_runs, tmp_path, capsys, monkeypatch):
    run, out = str(trained_runs.student), str(tmp_path / "out")
    other = tmp_path / "a01_s01_e00_v01.json"
    other.write_text("{}")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for arguments, message in (
        ([str(tmp_path / "no"), out], "neither the folder of a run nor an exported model"),
        ([run, out, "--part", "pupil"], "must be 'student' or 'teacher', got 'pupil'"),
        ([run, out, "--view", "elbow"], "view must be one of joint, angular_velocity, all"),
        ([run, out, "--check", str(other)], "must have the model's skeleton"),
        ([run, out, "--formats", "onnx"], "needs onnx, onnxscript, onnxruntime: pip install 'ikem_fast[export]'"),
        ([run, str(other)], "File exists"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert not list(tmp_path.glob("out/*"))
    with pytest.raises(SystemExit):
        main([run, out, "--formats", "tflite"])
    assert "invalid choice: 'tflite'" in capsys.readouterr().err


def test_export_needs_the_preparation(model, tmp_path):
    unknown = Model(model.encoders, None, model.heads, {})
    with pytest.raises(ModelError, match="does not know how its data set was prepared"):
        export_model(unknown, tmp_path)
    with pytest.raises(ValueError, match="formats must be some of safetensors, plain, onnx, got none"):
        export_model(model, tmp_path, [])


# ---- ONNX


@pytest.fixture(scope="module")
def alone(model):
    """The encoder whose modality needs every operation there is, and its head: torch takes seconds for each encoder."""
    name, config = "angular_velocity", model.encoders.config()
    encoders = FrozenEncoders.from_config({**config, "modalities": [name]})
    encoders.encoders.load_stream(0, model.encoders.encoders.stream_tensors(model.names.index(name)))
    heads = model.heads
    of_view = {name: heads.weights[name]}, {name: heads.biases[name]}
    return Model(encoders, model.preparation, LinearHeads(heads.class_names, {name: (name,)}, *of_view, {}), {})


@pytest.fixture(scope="module")
def onnx_file(trained_runs, alone, tmp_path_factory):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="of the extra 'export'")
    folder = tmp_path_factory.mktemp("onnx")
    path, difference = export_model(alone, folder, ["onnx"], clips=trained_runs.raw)["onnx"]
    assert difference < 1e-5
    assert list(folder.iterdir()) == [path]
    return path


def test_onnx_with_any_number_of_clips(trained_runs, alone, onnx_file):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    for number in (1, 7):
        batch = trained_runs.clip_set.batch(range(number))
        inputs = {"clips": batch.clips.numpy(), "num_frames": batch.num_frames.numpy()}
        features, logits = session.run(["features", "logits"], inputs)
        embeddings = alone.embed(batch.clips, num_frames=batch.num_frames)
        np.testing.assert_allclose(features, embeddings.features, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(logits, alone.classify(embeddings).logits, rtol=1e-4, atol=1e-4)


def test_onnx_says_what_it_is(alone, onnx_file):
    import onnx

    file = onnx.load(onnx_file)
    onnx.checker.check_model(file)
    said = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert said["class_names"] == list(alone.class_names)
    assert said["modalities"] == ["angular_velocity"]
    assert said["view"] == "angular_velocity"
    assert said["preparation"] == alone.preparation.to_dict()
    assert {entry.domain for entry in file.opset_import} == {""}


# ---- source


def test_bundle_takes_what_is_used_and_nothing_else():
    text = bundle({"derive_motion": modalities.get("motion")})
    names: dict[str, object] = {}
    exec(text, names)
    clips, num_frames = torch.randn(2, 3, 6, 4, 1), torch.tensor([20, 30])
    expected = modalities.get("motion")(clips, num_frames, None)
    assert torch.equal(names["derive_motion"](clips, num_frames, names["Layout"]), expected)
    assert "REFERENCE_FRAMES" in names
    assert "NORM_FLOOR" not in names
    assert '"""Velocities are scaled by this' in text  # what is said of a constant comes along


def derive(clips, num_frames, layout, *, chest_normal=True):
    """A modality of a user's own, with a helper of its own."""
    return doubled(clips)


def doubled(clips):
    return FACTOR * clips


FACTOR = 2


def test_bundle_follows_a_users_modality():
    names: dict[str, object] = {}
    exec(bundle({"derive_twice": derive}), names)
    assert names["derive_twice"](3, None, None) == 6


def test_bundle_refuses_what_it_cannot_write_out():
    with pytest.raises(SourceError, match="have the same name"):
        bundle({"derive": modalities.get("joint"), "doubled": derive})
    with pytest.raises(SourceError, match="is no definition at the top level"):
        bundle({"derive": lambda clips: clips})
    with pytest.raises(SourceError, match=r"must import ikem_fast by the names of its definitions"):
        bundle({"derive": _derive_with_functions})
