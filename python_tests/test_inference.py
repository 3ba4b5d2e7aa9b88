"""A trained model in use: every kind of input gives the features of the prepared set, and mistakes are named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from engine_helpers import write_clips
from evaluation_helpers import small_config, small_ikem
from scipy.io import savemat
from skeleton_text import make_text

import ikem_fast
from ikem_fast import engine, layouts
from ikem_fast.data import ClipSet, DataError, prepare, readers
from ikem_fast.data.preparation import Preparation
from ikem_fast.engine import checkpoints
from ikem_fast.evaluation import extract, load_scores
from ikem_fast.evaluation.heads import HEADS_FILE
from ikem_fast.inference import FrozenEncoders, Model, ModelError, save_model
from ikem_fast.methods import RelationalDistillation
from ikem_fast.modalities import MODALITIES
from ikem_fast.quirks import Quirks
from ikem_fast.safetensors_file import TensorFileError


@pytest.fixture(scope="module")
def model(trained_runs):
    return ikem_fast.load(trained_runs.student)


@pytest.fixture(scope="module")
def features(trained_runs):
    return extract(engine.load_run(trained_runs.student)[0], trained_runs.clip_set)


def recordings(trained_runs):
    """Paths in the order of the prepared set."""
    return [trained_runs.raw / f"{name}.skeleton" for name in trained_runs.clip_set.names]


def read(paths):
    layout = layouts.get("ntu-rgb+d")
    return [readers.get("synthetic").read(path, layout) for path in paths]


# ---- what a model is used on


def test_every_kind_of_input_gives_the_features_of_the_prepared_set(trained_runs, model, features):
    paths, clip_set = recordings(trained_runs), trained_runs.clip_set
    arrays, batch = read(paths), clip_set.batch(range(len(clip_set)))
    for clips, options in (
        (trained_runs.raw, {}),
        (str(trained_runs.raw), {}),
        (paths, {"batch_size": 5}),
        ((str(path) for path in paths), {}),
        (arrays, {}),
        ([torch.from_numpy(array).float() for array in arrays], {}),
        ([*paths[:10], *arrays[10:]], {}),
        (clip_set, {"batch_size": 7}),
        (batch.clips, {"num_frames": batch.num_frames}),
        (batch.clips.double().numpy(), {"num_frames": batch.num_frames.tolist()}),
    ):
        embeddings = model.embed(clips, **options)
        assert embeddings.names == features.names == ("joint", "angular_velocity")
        if isinstance(clips, list) and isinstance(clips[0], torch.Tensor):  # rounded before they were prepared
            torch.testing.assert_close(embeddings.features, features.features, rtol=1e-3, atol=1e-5)
        else:
            torch.testing.assert_close(embeddings.features, features.features, rtol=0, atol=0)
        assert len(embeddings) == len(clip_set)
    assert not torch.allclose(features.features[:, 0], features.features[:, 1], rtol=1e-2)  # the test can fail


def test_names_and_sources(trained_runs, model):
    paths = recordings(trained_runs)
    embeddings = model.embed([paths[3], *read(paths[:1]), paths[1]])
    assert embeddings.sample_names == (paths[3].stem, "recording 1", paths[1].stem)
    assert embeddings.sources == (str(paths[3]), "recording 1", str(paths[1]))
    assert model.embed(trained_runs.clip_set).sample_names == tuple(trained_runs.clip_set.names)
    batch = trained_runs.clip_set.batch([0, 1])
    assert model.embed(batch.clips, num_frames=batch.num_frames).sample_names == ("clip 0", "clip 1")


def test_one_recording_and_some_modalities(trained_runs, model, features):
    path = recordings(trained_runs)[2]
    for clips in (path, read([path])[0], torch.from_numpy(read([path])[0])):
        embeddings = model.embed(clips, modalities=["angular_velocity"])
        torch.testing.assert_close(embeddings.features, features.features[1:, 2:3], rtol=1e-5, atol=1e-7)
    fused = model.embed(path).fused
    assert fused.shape == (1, 16)
    torch.testing.assert_close(fused[0, :8].norm(), torch.tensor(1.0))


def test_a_person_less_is_an_absent_person(trained_runs, model):
    """Features are means over persons, absent ones too, so a recording of one must get the second one back."""
    (xyz,) = read(recordings(trained_runs)[:1])
    assert not xyz[..., 1].any()
    alone, both = model.embed(xyz[..., :1]), model.embed(xyz)
    assert torch.equal(alone.features, both.features)
    with pytest.raises(DataError, match=r"recording 0: a recording must be .* with 1 to 2 persons, got \(3, .*, 3\)"):
        model.embed(np.zeros((3, 10, 25, 3)))


def test_files_of_other_datasets(tmp_path):
    """NW-UCLA's JSON and UTD-MHAD's MATLAB files, prepared as their own sets are."""
    generator = np.random.default_rng(0)
    frames = generator.normal(size=(9, 20, 3))
    for kind, name in (("nw-ucla", "a01_s01_e00_v01.json"), ("utd-mhad", "a1_s1_t1_skeleton.mat")):
        source = tmp_path / kind
        source.mkdir()
        if kind == "nw-ucla":
            (source / name).write_text(json.dumps({"skeletons": frames.tolist()}))
        else:
            savemat(source / name, {"d_skel": frames.transpose(1, 2, 0)})
        prepare(kind, source, tmp_path / f"{kind} clips", num_frames=12, rotate=False)
        clip_set = ClipSet.open(tmp_path / f"{kind} clips")
        method = small_ikem(kind)
        model = Model(FrozenEncoders.of_method(method), Preparation.of_clips(clip_set), None, {})
        expected = extract(method, clip_set).features
        assert torch.equal(model.embed(source / name).features, expected)
        assert torch.equal(model.embed(source).features, expected)
        # Both have 20 joints, in another order.
        other = small_ikem({"nw-ucla": "utd-mhad", "utd-mhad": "nw-ucla"}[kind])
        foreign = Model(FrozenEncoders.of_method(other), Preparation.of_clips(clip_set), None, {})
        foreign.preparation = Preparation("ntu-rgb+d", 12, 1, True, False)
        for reader in (None, kind):
            message = rf"must have the model's skeleton '.*' \(20 joints\), got one of '{kind}'"
            with pytest.raises(DataError, match=message):
                foreign.embed(source / name, reader=reader)


def test_unusable_recordings(tmp_path, trained_runs, model):
    good = recordings(trained_runs)[0]
    damaged, missing = tmp_path / "damaged.skeleton", tmp_path / "missing.skeleton"
    lines = make_text([1, 1]).splitlines()
    damaged.write_text("\n".join([*lines[:10], "0.1 oops", *lines[11:]]))
    with pytest.raises(DataError, match=r"damaged\.skeleton: line 11: "):
        model.embed([good, damaged])
    with pytest.raises(DataError, match=r"missing\.skeleton: No such file"):
        model.embed(missing)
    embeddings = model.embed([damaged, good, missing, np.zeros((3, 4, 25, 1))], on_error="skip")
    assert embeddings.sources == (str(good),)
    assert [bad.file for bad in embeddings.skipped] == [str(damaged), str(missing), "recording 3"]
    assert "is zero in all 4 frames" in embeddings.skipped[2].reason
    with pytest.raises(DataError, match=r"none of the 2 recordings can be used; .*damaged"):
        model.embed([damaged, missing], on_error="skip")


def test_recordings_of_another_skeleton(tmp_path, trained_runs, model):
    other = tmp_path / "a01_s01_e00_v01.json"
    other.write_text(json.dumps({"skeletons": np.ones((4, 20, 3)).tolist()}))
    wanted = r"the model's skeleton 'ntu-rgb\+d' \(25 joints\)"
    for clips in (other, [recordings(trained_runs)[0], other]):
        # A slip of the user's, not of a recording's, so nothing is skipped for it.
        with pytest.raises(DataError, match=rf"must have {wanted}, got one of 'nw-ucla' \(20 joints\)"):
            model.embed(clips, on_error="skip")
    with pytest.raises(DataError, match=rf"holds no recording \.skeleton of {wanted}"):
        model.embed(tmp_path)
    with pytest.raises(DataError, match=r"must be \(3, F, 25, M\), got \(3, 4, 20, 2\)"):
        model.embed(np.ones((3, 4, 20, 1)))
    prepared = ClipSet.open(write_clips(tmp_path / "clips"))
    with pytest.raises(ValueError, match=f"must have {wanted}, got 'nw-ucla'"):
        model.embed(prepared)


def test_clips_prepared_otherwise(tmp_path, trained_runs, model):
    prepare("synthetic", trained_runs.raw, tmp_path / "clips", num_frames=20, rotate=False)
    with pytest.raises(ValueError, match="prepared as the model's: num_frames is 20, not 16, rotation is False, not"):
        model.embed(ClipSet.open(tmp_path / "clips"))


@pytest.mark.parametrize(
    ("clips", "options", "message"),
    [
        ([], {}, "clips must hold at least one recording"),
        (3, {}, "clips must be paths, arrays"),
        (np.zeros((3, 4, 25)), {}, r"a recording must be \(3, F, V, M\) numbers, got \(3, 4, 25\)"),
        (np.full((3, 4, 25, 1), np.nan), {}, "coordinate x of joint 1 in frame 1 must be finite"),
        (torch.zeros(2, 3, 16, 25, 2), {}, r"num_frames must be \(2,\) frames .* got none"),
        (torch.zeros(2, 3, 16, 25, 2), {"num_frames": [5]}, r"num_frames must be \(2,\) whole numbers"),
        (torch.zeros(2, 3, 16, 25, 2), {"num_frames": [5, 0]}, "above 0"),
        (torch.zeros(2, 3, 16, 20, 2), {"num_frames": [5, 5]}, r"clips must be \(N, 3, T, 25, M\)"),
        (torch.full((1, 3, 16, 25, 2), torch.inf), {"num_frames": [5]}, "clips must be finite"),
        (np.zeros((3, 4, 25, 1)), {"num_frames": [4]}, "num_frames is for prepared clips"),
        (np.zeros((3, 4, 25, 1)), {"modalities": ["bone"]}, "modalities must be some of joint, angular_velocity"),
        (np.zeros((3, 4, 25, 1)), {"batch_size": 0}, "batch_size must be at least 1"),
        (np.zeros((3, 4, 25, 1)), {"on_error": "stop"}, "on_error must be 'fail' or 'skip', got 'stop'"),
        ("words.txt", {}, "must end with .json, .mat, .skeleton, got '.txt'"),
        ("a.skeleton", {"reader": "nwucla"}, "did you mean 'nw-ucla'"),
        ("a.skeleton", {"reader": "nw-ucla"}, "must end with .json, got '.skeleton'"),
    ],
)
def test_arguments_that_do_not_fit(model, clips, options, message):
    with pytest.raises(ValueError, match=message):
        model.embed(clips, **options)


# ---- classes


def test_classes_are_those_of_the_linear_evaluation(trained_runs, model):
    """From raw recordings: the logits of every test clip by its name, and so the accuracies of the table."""
    evaluation = trained_runs.student / "evaluation"
    scores = load_scores(evaluation / "linear_scores.npz")
    embeddings = model.embed(trained_runs.raw)
    order = [embeddings.sample_names.index(name) for name in scores.sample_names]
    rows = json.loads((evaluation / "linear.json").read_text())["encoders"]
    for entry, used in ((rows[0], model), (rows[1], ikem_fast.load(trained_runs.student, part="teacher"))):
        # Rows with weights fuse the heads of other rows.
        trained = [row for row in entry["rows"] if "weights" not in row]
        assert list(used.views) == [row["name"] for row in trained]
        for row in trained:
            result = used.classify(trained_runs.raw, view=row["name"])
            logits = scores.logits[f"{entry['encoders']}/{row['name']}"]
            np.testing.assert_allclose(result.logits[order], logits, rtol=1e-4, atol=1e-5)
            labels = result.labels[order].numpy()
            assert (labels == scores.labels).mean() == pytest.approx(row["top1"])
            assert set(zip(result.sample_names, result.sources, strict=True)) == set(
                zip(embeddings.sample_names, embeddings.sources, strict=True)
            )
    assert len(set(model.classify(embeddings, view="joint").labels.tolist())) > 1  # the heads do tell clips apart


def test_probabilities_and_the_likeliest_classes(trained_runs, model):
    result = model.classify(trained_runs.clip_set)
    torch.testing.assert_close(result.probabilities.sum(dim=1), torch.ones(len(result)))
    best = result.top(2)
    assert [classes[0][0] for classes in best] == [result.class_names[label] for label in result.labels]
    assert all(first >= second for (_, first), (_, second) in best)
    assert len(result.top(99)[0]) == 4
    with pytest.raises(ValueError, match="k must be at least 1"):
        result.top(0)


def test_weighted_views(trained_runs, model):
    clips = trained_runs.clip_set
    embeddings = model.embed(clips)
    joint, omega = (model.classify(embeddings, view=view).logits for view in ("joint", "angular_velocity"))
    weighted = model.classify(embeddings, view={"joint": 0.6, "angular_velocity": 0.4})
    torch.testing.assert_close(weighted.logits, 0.6 * joint + 0.4 * omega)
    assert weighted.view == "0.6 joint + 0.4 angular_velocity"
    of_joint = model.embed(clips, modalities=["joint"])
    torch.testing.assert_close(model.classify(of_joint, view="joint").logits, joint)
    with pytest.raises(ValueError, match="clips must have features of joint, angular_velocity, got joint"):
        model.classify(of_joint)
    for view in ("elbow", {"elbow": 1}, {}, 3):
        with pytest.raises(ValueError, match="view must be one of joint, angular_velocity, all, or weights of some"):
            model.classify(embeddings, view=view)


def test_diverged_heads_name_nothing(trained_runs):
    model = ikem_fast.load(trained_runs.student)
    model.heads.weights["all"][0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="the heads of view 'all' are not finite"):
        model.classify(trained_runs.clip_set)
    assert model.classify(trained_runs.clip_set, view="joint").logits.isfinite().all()


# ---- runs


@pytest.fixture
def student(trained_runs, tmp_path):
    return shutil.copytree(trained_runs.student, tmp_path / "student")


def change(run, edit):
    path = run / "checkpoints" / "last.pt"
    checkpoint = checkpoints.load(path)
    edit(checkpoint)
    checkpoints.save(path, checkpoint)


def test_pretraining_run(trained_runs):
    model = ikem_fast.load(trained_runs.teacher, part="pretrained")
    method, _ = engine.load_run(trained_runs.teacher)
    assert torch.equal(model.embed(trained_runs.raw).features, extract(method, trained_runs.clip_set).features)
    with pytest.raises(ModelError, match="was not evaluated: no actions can be named"):
        model.classify(trained_runs.raw)
    with pytest.raises(ModelError, match=r"part of run .* must be 'pretrained', got 'student'"):
        ikem_fast.load(trained_runs.teacher, part="student")
    with pytest.raises(ModelError, match="must be 'student' or 'teacher', got 'pretrained'"):
        ikem_fast.load(trained_runs.student, part="pretrained")


def test_a_run_outlives_its_data(student, trained_runs, features):
    def forget(checkpoint):
        checkpoint["data"]["folder"] = "/nowhere"

    change(student, forget)
    model = ikem_fast.load(student)
    assert torch.equal(model.embed(trained_runs.raw).features, features.features)


def test_runs_of_before_preparations_were_kept(student, trained_runs, features):
    change(student, lambda checkpoint: checkpoint["data"].pop("preparation"))
    asked = ikem_fast.load(student)  # of the data folder
    assert torch.equal(asked.embed(trained_runs.raw).features, features.features)

    def forget(checkpoint):
        checkpoint["data"]["folder"] = "/nowhere"

    change(student, forget)
    model = ikem_fast.load(student)
    assert torch.equal(model.embed(trained_runs.clip_set).features, features.features)
    with pytest.raises(ValueError, match="recordings cannot be prepared as the model's data set was"):
        model.embed(trained_runs.raw)
    told = ikem_fast.load(student, data=trained_runs.clips)
    assert torch.equal(told.embed(trained_runs.raw).features, features.features)


def test_data_that_is_not_the_runs(tmp_path, trained_runs):
    prepare("synthetic", trained_runs.raw, tmp_path / "clips", num_frames=20)
    with pytest.raises(DataError, match="must be prepared as the model's data set: num_frames is 20, not 16"):
        ikem_fast.load(trained_runs.student, data=tmp_path / "clips")
    with pytest.raises(DataError, match="must have the model's skeleton"):
        ikem_fast.load(trained_runs.student, data=write_clips(tmp_path / "other"))


def test_heads_of_another_state_of_the_run(student, trained_runs):
    def go_on(checkpoint):
        checkpoint["step"] += 1

    change(student, go_on)
    model = ikem_fast.load(student)
    assert len(model.embed(trained_runs.raw)) == 32
    with pytest.raises(ModelError, match=r"its heads were trained at step 4, the run is at step 5: no actions"):
        model.classify(trained_runs.raw)


def test_damaged_heads(student):
    (student / "evaluation" / HEADS_FILE).write_bytes(b"{}")
    with pytest.raises(TensorFileError, match=r"linear_heads\.safetensors is damaged"):
        ikem_fast.load(student)


def test_precision_and_device(trained_runs, features):
    model = ikem_fast.load(trained_runs.student, precision="bf16")
    rounded = model.embed(trained_runs.clip_set).features
    assert not torch.equal(rounded, features.features)
    torch.testing.assert_close(rounded, features.features, rtol=0.1, atol=2e-3)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, auto, got 'half'"):
        ikem_fast.load(trained_runs.student, precision="half")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or"):
        ikem_fast.load(trained_runs.student, device="abacus")


def test_loading_leaves_the_random_state_alone(trained_runs):
    before = torch.get_rng_state()
    ikem_fast.load(trained_runs.student)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("early_fusion", [False, True])
@pytest.mark.parametrize("modalities", [("joint", "motion", "bone"), MODALITIES])
@pytest.mark.parametrize("part", ["student", "teacher"])
def test_encoders_are_the_trainers_with_every_quirk(tmp_path, early_fusion, modalities, part):
    """Also where the student sees less modalities than decide on the chest normal."""
    clip_set = ClipSet.open(write_clips(tmp_path / "clips"))
    teacher = small_ikem(modalities=modalities, quirks=Quirks(early_fusion_student=early_fusion))
    for students in (("joint", "motion", "bone"), ("bone", "joint", "motion"), ("bone",)):
        method = RelationalDistillation.from_teacher(teacher, student_modalities=students).eval()
        model = Model(FrozenEncoders.of_method(method, part), Preparation.of_clips(clip_set), None, {"part": part})
        expected = extract(method, clip_set, part=part)
        assert model.names == expected.names
        # Encoders by themselves or stacked with others run in another order.
        torch.testing.assert_close(model.embed(clip_set).features, expected.features, rtol=1e-5, atol=1e-12)
        save_model(model, tmp_path / "model.safetensors")
        again = ikem_fast.load(tmp_path / "model.safetensors")
        assert torch.equal(again.embed(clip_set).features, model.embed(clip_set).features)


# ---- files


def test_an_exported_model_is_the_model(tmp_path, trained_runs, model):
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    again = ikem_fast.load(path)
    for view in model.views:
        result, expected = (each.classify(trained_runs.raw, view=view) for each in (again, model))
        assert torch.equal(result.logits, expected.logits)
    assert again.class_names == model.class_names
    assert again.preparation == model.preparation
    assert again.origin["run"] == {"kind": "distill", "epoch": 2, "step": 4}
    assert ikem_fast.load(path, part="student", precision="bf16").encoders.precision == "bf16"
    with pytest.raises(ModelError, match="must be 'student', got 'teacher'"):
        ikem_fast.load(path, part="teacher")


def test_foreign_and_damaged_files(tmp_path, trained_runs, model):
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(TensorFileError, match="is damaged or no safetensors file"):
        ikem_fast.load(path)
    with pytest.raises(TensorFileError, match="must be of the format 'ikem_fast model', got 'ikem_fast linear heads'"):
        ikem_fast.load(trained_runs.student / "evaluation" / HEADS_FILE)
    with pytest.raises(TensorFileError, match="is damaged or no safetensors file"):
        ikem_fast.load(trained_runs.student / "checkpoints" / "last.pt")
    with pytest.raises(ModelError, match="is neither the folder of a run nor an exported model"):
        ikem_fast.load(tmp_path / "nothing")
    with pytest.raises(checkpoints.CheckpointError, match="holds no run"):
        ikem_fast.load(tmp_path)


def test_a_file_that_does_not_fit_its_description(tmp_path, model):
    path = tmp_path / "model.safetensors"
    encoders = model.encoders.config()
    tensors = {f"encoders.{name}": tensor for name, tensor in model.encoders.encoders.state_dict().items()}
    whole = {"encoders": encoders, "preparation": None, "origin": {}, "heads": None}
    for change, kept in (
        ({"encoders": {**encoders, "feature_size": 9}}, tensors),
        ({"encoders": {**encoders, "modalities": ["joint", "elbow"]}}, tensors),
        ({"encoders": {}}, tensors),
        ({"preparation": {"kind": "x"}}, tensors),
        ({"heads": {"class_names": ["a"], "views": {"all": ["joint"]}, "training": {}}}, tensors),
        ({}, {}),
    ):
        ikem_fast.safetensors_file.write(path, "ikem_fast model", 1, kept, {**whole, **change})
        with pytest.raises(TensorFileError, match="does not fit its own description"):
            ikem_fast.load(path)


def test_configurations_say_what_recordings_went_through(trained_runs, tmp_path):
    """A run keeps its data set's preparation in its checkpoint."""
    clips = tmp_path / "clips"
    prepare("synthetic", trained_runs.raw, clips, num_frames=18, centre=False)
    engine.pretrain(clips, tmp_path / "run", small_config("max_steps=1"), progress=False)
    model = ikem_fast.load(tmp_path / "run")
    assert model.preparation == Preparation("synthetic", 18, 2, False, True)
    with pytest.raises(ValueError, match="a preparation's num_frames must be a int, got '18'"):
        Preparation.from_dict({**model.preparation.to_dict(), "num_frames": "18"})
    with pytest.raises(ValueError, match="a preparation must hold kind, num_frames"):
        Preparation.from_dict({"kind": "synthetic"})
