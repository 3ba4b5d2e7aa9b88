"""The report page: complete, valid, right in what it shows, and with nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from evaluation_helpers import small_config, write_clip_set

from ikem_fast import MODALITIES, engine, layouts
from ikem_fast.data import ClipSet, DataError
from ikem_fast.engine import checkpoints
from ikem_fast.engine.run_log import LogError
from ikem_fast.evaluation import evaluate_run
from ikem_fast.evaluation.tables import Table
from ikem_fast.ops import derive_modalities_reference
from ikem_fast.report import ReportError, drawing, page, skeleton, write_report
from ikem_fast.report.__main__ import main
from ikem_fast.report.modality_picture import modality_picture
from ikem_fast.report.records import Material, evenly_spaced, read_curves, read_runs
from ikem_fast.report.sections import (
    accuracy,
    confusion,
    embedding,
    evaluations,
    facts,
    training,
)
from ikem_fast.report.sections import clips as clips_section
from ikem_fast.report.sections import runs as runs_section

HOSTILE = "</script><img src=x onerror=alert(1)> & \"co\" 'x'"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread):
    """A data set; a teacher, evaluated not at all; its student, evaluated twice; a second teacher that differs."""
    folder = tmp_path_factory.mktemp("runs")
    clips = write_clip_set(folder / "clips").folder
    engine.pretrain(clips, folder / "teacher", small_config(), progress=False)
    # Few short steps leave encoders to which all clips look alike.
    taught = small_config("distill.max_gradient_norm=null")
    engine.distill(None, folder / "teacher", folder / "student", taught, progress=False)
    other = small_config("seed=5", "pretrain.learning_rate=0.02", "model.modalities=[joint,bone]", "pretrain.epochs=3")
    engine.pretrain(clips, folder / "other", other, progress=False)
    evaluate_run("linear", folder / "student", overrides=["epochs=2"], untrained=True, progress=False)
    evaluate_run("knn", folder / "student", progress=False)
    return folder


@pytest.fixture(scope="module")
def experiment(runs, tmp_path_factory):
    """The page of a teacher and its student."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    phases = [("a phase", 75.0)]
    assert write_report([runs / "teacher", runs / "student"], out, title="A <title>", phases=phases) == out
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    return Page(out)


@pytest.fixture
def quick_pictures(monkeypatch):
    """Panels in the place of pictures of modalities, which take a second each."""
    panel = drawing.Line((np.arange(3.0), np.arange(3.0)), "joint")
    monkeypatch.setattr(clips_section, "modality_picture", lambda *_: drawing.line_panel([panel], x_label="x"))


class Page(HTMLParser):
    """A parsed page: its tags, texts and data, every tag closed by its own."""

    EMPTY = ("meta", "img", "link", "br", "input")

    def __init__(self, source):
        super().__init__()
        self.text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.data: list = []
        self.shown: list[str] = []
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            if self.tags[-1] == ("script", {"type": "application/json"}):
                self.data.append(json.loads(text))
        elif self.open and self.open[-1] != "style":
            self.shown.append(text)
            if self.open[-1] == "h2":
                self.headings.append(text)

    def of(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]

    def clips(self):
        return [value for value in self.data if "positions" in value]

    def plots(self):
        return [value for value in self.data if "positions" not in value]


def page_of(sections, folders, **options):
    """The page that only some sections make: drawing all of them takes seconds."""
    material = Material(read_runs(folders), **{"embedding": None, **options})
    return Page(page.page("title", "lead", [section for render in sections for section in render(material)]))


def svg_of(address):
    prefix = "data:image/svg+xml;base64,"
    assert address.startswith(prefix)
    return base64.b64decode(address.removeprefix(prefix), validate=True).decode()


def assert_self_contained(parsed):
    """Nothing on the page, or in a picture on it, is fetched from anywhere."""
    for _tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "xlink:href", "action", "data"):
            reference = attributes.get(name)
            assert reference is None or reference.startswith(("data:image/svg+xml;base64,", "#section-"))
    for text in [parsed.text, *(svg_of(image["src"]) for image in parsed.of("img"))]:
        assert "@import" not in text
        assert not re.search(r"url\((?!#)", text)
        assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\b\s*\(", parsed.text)


# ---- the whole page --------------------------------------------------------------------------------------------------


def test_page_of_a_run_and_its_student(experiment):
    assert experiment.headings == [
        *("Runs side by side", "Accuracy", "Pretraining", "Distillation", "Embedding", "Confusion", "Clips"),
        *("The six modalities", "What was run"),
    ]
    assert "A <title>" in experiment.shown
    assert "1 min 15 s" in experiment.shown
    assert "hidden_channels: 2" in experiment.text
    # accuracy; losses of both; kNN, rate and speed of both; accuracy of two contrasts; modalities
    assert len(experiment.of("img")) == 1 + 3 + 1 + 2 * 3 + 2 + 1
    assert len(experiment.text) < 2_000_000


def test_page_needs_nothing_else(experiment):
    assert_self_contained(experiment)


def test_page_can_be_used_without_eyes_mouse_or_scripts(experiment):
    for image in experiment.of("img"):
        assert image["alt"]
    for svg in experiment.of("svg"):
        assert svg["aria-label"]
        assert svg["role"] == "img"
    for slider in experiment.of("input"):
        assert slider["aria-label"] == "frame"
    # Controls appear with the script; the first frame and the points are there without it.
    controls = [found for _tag, found in experiment.tags if "controls" in (found.get("class") or "").split()]
    assert len(controls) == 2 * 3 + 2
    assert all("hidden" in found for found in controls)
    assert all(found["tabindex"] == "0" for found in experiment.of("div", **{"class": "scroll"}))
    assert len(experiment.of("path")) == 3 * 3
    assert len(experiment.of("circle")) == 2 * 6


def test_page_has_headlines_and_a_confusion_matrix_of_trained_encoders(experiment, runs):
    linear = json.loads((runs / "student" / "evaluation" / "linear.json").read_text())
    top1 = {entry["encoders"]: entry["rows"][-1]["top1"] for entry in linear["encoders"]}
    for value in top1.values():
        assert f"{100 * value:.1f} %" in experiment.shown
    texts = [text for text in experiment.shown if "view “all”" in text]
    assert texts == ["student, view “all”", "teacher, view “all”"]
    assert len(experiment.of("table", **{"class": "confusion"})) == 2


def test_page_of_one_run_that_was_not_evaluated(tmp_path, runs, quick_pictures):
    out = write_report([runs / "teacher"], tmp_path / "page.html", samples=["clip003", "clip001"], embedding=None)
    parsed = Page(out)
    assert_self_contained(parsed)
    assert parsed.headings == ["Pretraining", "Clips", "The six modalities", "What was run"]
    captions = [text for text in parsed.shown if text.startswith("clip0")]
    assert captions == [
        *("clip003, “action 0”", "clip001, “action 1”"),  # in motion
        *("clip003, “action 0”", "clip001, “action 1”"),  # as pictures
    ]
    assert parsed.of("title") == [{}]
    assert "Run teacher" in parsed.shown


def test_names_cannot_break_out_of_the_page(tmp_path, runs, quick_pictures):
    clips = shutil.copytree(runs / "clips", tmp_path / "clips")
    metadata = json.loads((clips / "dataset.json").read_text())
    metadata["class_names"][0] = metadata["kind"] = HOSTILE
    (clips / "dataset.json").write_text(json.dumps(metadata))
    table = (clips / "samples.csv").read_text()
    quoted = '"' + HOSTILE.replace('"', '""') + '"'
    (clips / "samples.csv").write_text(table.replace("clip006,", f"{quoted},"))
    run = shutil.copytree(runs / "student", tmp_path / "run <b>")
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "note", "epoch": 1, "step": 0, "text": f"is {HOSTILE}"}) + "\n")
    path = run / "evaluation" / "linear.json"
    evaluation = json.loads(path.read_text())
    evaluation["data"]["class_names"][0] = evaluation["encoders"][0]["encoders"] = HOSTILE
    evaluation["encoders"][0]["rows"][0]["name"] = HOSTILE
    path.write_text(json.dumps(evaluation))
    other = {
        "kind": HOSTILE,
        "title": HOSTILE,
        "encoders": [{"encoders": "x", "rows": [{"name": "y", HOSTILE: HOSTILE}]}],
    }
    (run / "evaluation" / "other.json").write_text(json.dumps(other))
    parsed = Page(write_report([run], tmp_path / "page.html", data=clips, samples=[HOSTILE], title=HOSTILE))
    assert not [found for tag, found in parsed.tags if "onerror" in found or found.get("src") == "x"]
    assert HOSTILE in parsed.shown
    assert f"Is {HOSTILE}." in parsed.shown
    # Pictures are XML with names in them too.
    for image in parsed.of("img"):
        assert "<img" not in svg_of(image["src"])
    assert_self_contained(parsed)


def test_notes_are_said_once(tmp_path, runs):
    run = shutil.copytree(runs / "teacher", tmp_path / "run")
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "note", "epoch": 1, "step": 0, "text": "steps are <not> captured"}\n' * 2)
    parsed = page_of([training.render], [run])
    assert parsed.text.count('<p class="notice">Steps are &lt;not&gt; captured.</p>') == 1


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_comparison_lists_the_settings_that_differ(runs):
    folders = [runs / "teacher", runs / "other"]
    material = Material(read_runs(folders))
    parsed = page_of([runs_section.render], folders)
    assert parsed.headings == ["Runs side by side"]
    rows = {row[0]: row[1:] for row in runs_section.differing_settings(material.runs)}
    six = ", ".join(MODALITIES)
    assert rows == {
        "seed": ("0", "5"),
        "model.modalities": (six, "joint, bone"),
        "pretrain.epochs": ("2", "3"),
        "pretrain.learning_rate": (rows["pretrain.learning_rate"][0], "0.02"),
    }
    for name, values in rows.items():
        cells = "".join(f"<td>{value}</td>" for value in (name, *values))
        assert cells in re.sub(" class=number", "", parsed.text)


def test_comparison_lays_curves_over_each_other(tmp_path, runs):
    second = shutil.copytree(runs / "teacher", tmp_path / "second")
    parsed = page_of([runs_section.render, training.render], [runs / "teacher", second])
    assert_self_contained(parsed)
    assert "None: the runs have the same settings, data and versions." in parsed.shown
    panels = {image["alt"]: svg_of(image["src"]) for image in parsed.of("img")}
    for alt in ("loss: contrast within a modality, mean over modalities, by step", "all, all runs by epoch"):
        for position in range(2):
            assert f"var(--series-{position})" in panels[alt]
        assert "var(--series-2)" not in panels[alt]


def test_evaluated_runs_stand_side_by_side(tmp_path, runs):
    second = shutil.copytree(runs / "student", tmp_path / "again")
    parsed = page_of([accuracy.render], [runs / "student", second])
    assert "again: student" in parsed.shown
    groups = {
        "a": {"joint": {"top1": 0.5}, "all": {"top1": 0.75, "spread": {"top1": 0.01}}},
        "b": {"joint": {"top1": 0.25}},
    }
    assert accuracy.side_by_side(groups) == Table(
        ("linear top-1 %", "a", "b"), (("joint", "50.0", "25.0"), ("all", "75.0 ± 1.0", "-"))
    )
    axes = accuracy.accuracy_dots(groups, chance=0.1).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["joint", "all"]
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xdata().astype(float), [50, 75])


def test_names_tell_runs_apart(tmp_path, runs):
    for name in ("a", "b"):
        shutil.copytree(runs / "teacher", tmp_path / name / "run")
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    with pytest.raises(ReportError, match="distinct folders"):
        read_runs([folders[0], tmp_path / "a" / ".." / "a" / "run"])


# ---- what is missing or damaged --------------------------------------------------------------------------------------


def test_data_that_is_gone_is_left_out(tmp_path, runs):
    folder = tmp_path / "moved"
    for name in ("clips", "student", "teacher"):
        shutil.copytree(runs / name, folder / name)
    for name in ("student", "teacher"):
        path = folder / name / "checkpoints" / "last.pt"
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["data"]["folder"] = str(tmp_path / "nowhere")
        torch.save(checkpoint, path)
    out = tmp_path / "page.html"
    parsed = Page(write_report([folder / "teacher", folder / "student"], out))
    assert parsed.headings == [
        *("Runs side by side", "Accuracy", "Pretraining", "Distillation", "Confusion", "What was run")
    ]
    assert [text for text in parsed.shown if text.startswith("Left out is what needs the clips") and "nowhere" in text]
    # The share of the commonest action is known from the evaluation.
    assert "33.3 %" in parsed.shown
    parsed = page_of([embedding.render], [folder / "teacher"], data=folder / "clips", embedding="fused")
    assert parsed.headings == ["Embedding"]
    with pytest.raises(DataError, match="nowhere"):
        write_report([folder / "teacher"], out, samples=["clip003"])


def test_unfinished_run_without_log_lines(tmp_path, runs):
    run = tmp_path / "run"
    engine.pretrain(runs / "clips", run, small_config("max_steps=1", "logging.knn_every_epochs=0"), progress=False)
    assert "Ended at max_steps, in epoch 1 of 2" in page_of([training.render], [run]).text
    checkpoint = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    torch.save({**checkpoint, "config": {**checkpoint["config"], "max_steps": None}}, run / "checkpoints" / "last.pt")
    (run / "log.jsonl").write_text("")
    parsed = page_of([training.render, facts.render], [run])
    assert "Unfinished: epoch 1 of 2; 1 steps" in parsed.text
    (run / "log.jsonl").unlink()
    parsed = page_of([training.render], [run])
    assert "Log.jsonl is missing, and with it the curves." in parsed.shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"encoders": [', r"knn\.json is damaged: .*run the evaluation again"),
        ("[1, 2]", r"knn\.json is damaged: it must be an object with a list of 'encoders'"),
        ('{"kind": "knn"}', "list of 'encoders'"),
        ('{"encoders": [{"rows": []}]}', "every entry of 'encoders' must be an object with its name"),
        ('{"encoders": [{"encoders": "student", "rows": [3]}]}', "'rows' of student must be a list of objects"),
        (
            '{"encoders": [{"encoders": "student", "rows": [{"name": "all"}]}]}',
            "'accuracy' of student, all, is missing",
        ),
        ('{"encoders": [], "data": 3}', "'data' must be an object"),
        ("\xff\xfe", r"knn\.json is damaged"),
    ],
)
def test_damaged_evaluation_is_named(tmp_path, runs, content, message):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    (run / "evaluation" / "knn.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ReportError, match=message):
        write_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("confusion", [3, {"counts": [[1, 2]], "view": "all"}, {"counts": [["x"]], "view": "all"}, {}])
def test_damaged_confusion_is_named(tmp_path, runs, confusion):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    path = run / "evaluation" / "linear.json"
    evaluation = json.loads(path.read_text())
    evaluation["encoders"][0]["confusion"] = confusion
    path.write_text(json.dumps(evaluation))
    with pytest.raises(ReportError, match="'confusion' of student must hold a 'view' and a square of 'counts'"):
        read_runs([run])


@pytest.mark.parametrize(
    "line", ["{", '{"kind": "train", "step": 1}', "3", '{"kind": "knn", "accuracy": 1, "epoch": 1}']
)
def test_damaged_log_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"kind": "note", "text": "x"}}\n{line}\n')
    with pytest.raises(LogError, match=r"log\.jsonl: line [12]: damaged: "):
        read_curves(tmp_path)


def test_other_files_beside_evaluations_are_none_of_the_page(tmp_path, runs):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    (run / "evaluation" / "fused.json").write_text('{"num_test": 3, "parts": []}')
    assert "fused" not in read_runs([run])[0].evaluations


def test_command_line(tmp_path, runs, capsys, quick_pictures):
    run = shutil.copytree(runs / "teacher", tmp_path / "run")
    assert main([str(run), "--no-embedding", "--sample", "clip003", "--sample", "clip004"]) == 0
    assert re.search(r"written to .*report\.html \(\d\.\d MB\)", capsys.readouterr().out)
    assert len(Page(run / "report.html").clips()) == 2
    for arguments, message in [
        ([run, "--sample", "clip999"], "error: sample must be the name of a clip in .*, got 'clip999'"),
        ([tmp_path / "none"], "error: checkpoint .*none.* does not exist"),
        ([run, "--data", tmp_path / "none"], "error: .*none: no such folder"),
        ([run, "--out", tmp_path / "none" / "x.html"], "error: out must be a file in a folder that exists, got .*none"),
    ]:
        assert main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr().err
        assert re.fullmatch(message + ".*\n", output)
    with pytest.raises(ReportError, match="embedding must be fused or modalities or None, got 'all'"):
        write_report([run], tmp_path / "x.html", embedding="all")
    with pytest.raises(ReportError, match="at least one run"):
        write_report([], tmp_path / "x.html")


# ---- clips -----------------------------------------------------------------------------------------------------------


def derived(layout, clip, num_frames=40):
    return derive_modalities_reference(clip, torch.tensor([num_frames]), layout, MODALITIES)[:, 0].numpy()


def test_animation_moves_as_the_clip_does(experiment, runs):
    clip_set = ClipSet.open(runs / "clips")
    assert len(experiment.clips()) == 3
    captions = [text for text in experiment.shown if text.startswith("clip0") and "“" in text][:3]
    for clip, caption in zip(experiment.clips(), captions, strict=True):
        index = clip_set.names.index(caption.split(",")[0])
        assert clip_set.splits[index] == "test"
        millimetres = 1000 * clip_set.clips[index].transpose(1, 3, 2, 0)[:, :1]
        shape = (clip["frames"], clip["persons"], clip["joints"], 3)
        assert shape == millimetres.shape
        np.testing.assert_allclose(np.array(clip["positions"]).reshape(shape), millimetres, atol=0.501)
        assert clip["parents"] == list(clip_set.layout.bone_parents)


def test_first_frame_is_drawn_where_the_script_draws_it(experiment, runs):
    clip = experiment.clips()[0]
    dots = [path["d"] for path in experiment.of("path") if path.get("stroke-width") == "36"]
    drawn = np.array(re.findall(r"M(-?\d+) (-?\d+)h0", dots[0]), dtype=int)
    points = np.array(clip["positions"][: 3 * clip["joints"]]).reshape(-1, 3) - clip["centre"]
    yaw, pitch = clip["view"]
    right = np.cos(yaw) * points[:, 0] - np.sin(yaw) * points[:, 2]
    depth = np.sin(yaw) * points[:, 0] + np.cos(yaw) * points[:, 2]
    np.testing.assert_allclose(
        drawn, np.stack([right, np.sin(pitch) * depth - np.cos(pitch) * points[:, 1]], 1), atol=1
    )
    # And inside the picture.
    assert (np.abs(drawn) <= clip["size"]).all()


def test_animation_of_two_persons_one_of_whom_comes_later():
    layout = layouts.get("ntu-rgb+d")
    clip = torch.randn(1, 3, 240, 25, 2, generator=torch.Generator().manual_seed(0))
    clip[:, :, :60, :, 1] = 0
    animation = clips_section.animation(derived(layout, clip), layout)
    assert (animation["frames"], animation["persons"]) == (100, 2)
    shape = (100, 2, 25, 3)
    positions = np.array(animation["positions"]).reshape(shape)
    assert not positions[:25, 1].any()
    kept = evenly_spaced(240, 100)
    np.testing.assert_allclose(positions, 1000 * clip[0].numpy().transpose(1, 3, 2, 0)[kept], atol=0.501)
    bones = np.array(animation["vectors"]["bone"]).reshape(shape)
    starts = positions[:, 0][:, animation["starts"]["bone"]]
    ends = starts + bones[:, 0]
    joints = [joint for joint in range(25) if joint != layout.root]
    long = np.linalg.norm(bones[:, 0], axis=-1)[:, joints] > 0
    np.testing.assert_allclose(ends[:, joints][long], positions[:, 0][:, joints][long], atol=2)
    assert animation["starts"]["motion"] == list(range(25))
    clip[..., 1] = 0
    assert clips_section.animation(derived(layout, clip), layout)["persons"] == 1


def test_arrows_are_shortened_but_keep_their_direction():
    layout = layouts.get("nw-ucla")
    vectors = np.random.default_rng(0).normal(size=(30, 1, 20, 3))
    vectors[0, 0, 0] *= 100
    vectors[0, 0, 1] *= 1e-6
    drawn = skeleton.arrows(vectors, "motion", layout, height=2.0)
    lengths = np.linalg.norm(drawn, axis=-1)
    assert lengths.max() == pytest.approx(0.28 * 2.0)
    assert lengths[0, 0, 1] == 0
    cosine = (
        (drawn[0, 0, 0] * vectors[0, 0, 0]).sum() / np.linalg.norm(drawn[0, 0, 0]) / np.linalg.norm(vectors[0, 0, 0])
    )
    assert cosine == pytest.approx(1)


def test_lively_clips_are_test_clips_of_different_actions(runs):
    clip_set = ClipSet.open(runs / "clips")
    chosen = clips_section.lively_clips(clip_set, 3)
    assert sorted(clip_set.labels[chosen]) == [0, 1, 2]
    assert set(clip_set.splits[chosen]) == {"test"}


@pytest.mark.parametrize("name", ["ntu-rgb+d", "nw-ucla", "utd-mhad"])
def test_modality_picture_of_every_layout(name):
    layout = layouts.get(name)
    clip = torch.randn(1, 3, 12, layout.num_joints, 2, generator=torch.Generator().manual_seed(0))
    clip[..., 1] = 0
    figure = modality_picture(derived(layout, clip), MODALITIES, layout, num_columns=2)
    # One panel per modality and frame, one map per modality with its colour bar.
    assert len(figure.axes) == 6 * (2 + 2)
    assert "var(--rotation-axis)" in svg_of(drawing.draw_svg(figure).address)


def test_clip_of_one_frame_without_motion_can_be_drawn():
    layout = layouts.get("nw-ucla")
    modalities = derived(layout, torch.zeros(1, 3, 1, 20, 1), num_frames=1)
    assert "<svg" in svg_of(drawing.draw_svg(modality_picture(modalities, MODALITIES, layout)).address)
    animation = clips_section.animation(modalities, layout)
    assert (animation["frames"], animation["persons"], set(animation["positions"])) == (1, 1, {0})
    assert min(animation["size"]) >= 1


# ---- embedding -------------------------------------------------------------------------------------------------------


def test_embedding_is_the_same_every_time_and_keeps_classes_apart():
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = generator.normal(size=(3, 24))[labels] + 0.1 * generator.normal(size=(90, 24))
    places = embedding.tsne(features)
    np.testing.assert_array_equal(places, embedding.tsne(torch.from_numpy(features)))
    assert places.shape == (90, 2)
    assert places.min() == pytest.approx(30)
    assert places.max() == pytest.approx(970)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).all()


def test_embedding_of_every_modality_to_choose_from(runs):
    parsed = page_of([embedding.render], [runs / "student"], embedding="modalities")
    (plot,) = parsed.plots()
    assert list(plot) == ["all", "joint", "motion", "bone"]
    circles = np.array([(int(c["cx"]), int(c["cy"])) for c in parsed.of("circle")])
    np.testing.assert_array_equal(circles.ravel(), plot["all"]["points"])
    words = np.array([(int(t["x"]), int(t["y"])) for t in parsed.of("text")])
    np.testing.assert_array_equal(words.ravel(), plot["all"]["labels"])
    assert {option["value"] for option in parsed.of("option")} >= {"all", "joint", "motion", "bone", "", "0", "1", "2"}
    # The points of an action stand together, each with its clip's name.
    clip_set = ClipSet.open(runs / "clips").split("test")
    names = [name for label in range(3) for name in np.array(clip_set.names)[clip_set.labels == label]]
    titles = [text.split(":")[0] for text in parsed.shown if re.fullmatch(r"clip\d+: action \d", text)]
    assert titles == names


def test_embedding_says_why_it_is_missing(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(embedding, "_FEWEST_POINTS", 100)
    parsed = page_of([embedding.render], [runs / "teacher"], embedding="fused")
    assert "teacher: 6 test clips are too few for a plot." in parsed.shown
    monkeypatch.undo()
    other = write_clip_set(tmp_path / "clips", layout="utd-mhad").folder
    parsed = page_of([embedding.render], [runs / "teacher"], embedding="fused", data=other)
    assert "teacher has another skeleton than the clips, nw-ucla." in parsed.shown


def test_words_in_the_plot_do_not_stand_on_each_other():
    places = np.array([[500.0, 400.0], [500, 400], [510, 405], [5, 100], [999, 600]])
    widths = np.full(5, 150.0)
    moved = embedding.label_places(places, widths)
    apart = np.abs(moved[:, None] - moved[None])
    assert not ((apart[..., 0] < 150) & (apart[..., 1] < 20))[~np.eye(5, dtype=bool)].any()
    assert moved[:, 0].min() >= 75
    assert moved[:, 0].max() <= 925
    np.testing.assert_array_equal(moved[3:, 1], places[3:, 1])


def test_colours_of_actions_differ():
    for number in (10, 60):
        assert len({embedding.class_colour(position, number) for position in range(number)}) == number


# ---- tables and figures ----------------------------------------------------------------------------------------------


def test_confusion_shows_shares_of_the_true_class():
    text = confusion.confusion_table(np.array([[3, 1], [0, 0]]), ["wave", "<kick>"])
    assert re.findall(r'<td[^>]*style="--share:(\d+)">(\d+)</td>', text) == [("75", "75"), ("25", "25")]
    assert text.count("<td></td>") == 1 + 2
    assert text.count(escape("<kick>")) == 2
    assert "<kick>" not in text
    big = confusion.confusion_table(np.eye(60), [f"action {number}" for number in range(60)])
    assert big.count('title="action') == 60
    assert 'class="confusion dense"' in big


def test_rows_of_any_evaluation_become_a_table():
    rows = [
        {"name": "joint", "modalities": ["joint"], "top1": 0.5, "fraction": 0.01, "recall": {"1": 0.25}, "loss": 3.25},
        {"name": "all", "top1": 0.75, "fraction": 0.1, "spread": {"top1": 0.02}, "count": 3, "weights": [1, 2]},
    ]
    table = evaluations.rows_table({"student": {"encoders": "student", "rows": rows}})
    assert table.columns == ("encoders", "view", "labels %", "top-1 %", "recall at 1 %", "loss", "n")
    assert table.rows == (
        ("student", "joint", "1.0", "50.0", "25.0", "3.25", "-"),
        ("student", "all", "10.0", "75.0 ± 2.0", "-", "-", "3"),
    )


def test_evaluations_without_a_section_of_their_own_are_shown(tmp_path, runs):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    (run / "evaluation" / "linear.json").unlink()
    semi = {
        "kind": "semi",
        "title": "few <labels>",
        "data": {"num_test": 6, "folder": "there"},
        "encoders": [{"encoders": "student", "epochs": 3, "rows": [{"name": "joint", "top1": 0.5}]}],
    }
    (run / "evaluation" / "semi.json").write_text(json.dumps(semi))
    parsed = page_of([accuracy.render, evaluations.render], [run])
    assert parsed.headings == ["Nearest neighbours", "Few labels"]
    assert "Few <labels>; 6 test clips of there; epochs: 3." in parsed.shown


def test_table_in_html():
    text = page.table(Table(("a", "b"), (("x", 0.5), ("x", None), ("<y>", 1.0))))
    assert text.count("class=group") == 1
    assert "&lt;y&gt;" in text
    assert re.findall(r"<td class=number>([^<]*)</td>", text) == ["50.0", "-", "100.0"]


def test_lines_are_smoothed_thinned_and_marked():
    steps = np.arange(1.0, 3001)
    line = drawing.Line((steps, 5 - steps / 1000), "joint", smoothed=True)
    figure = drawing.line_panel([line], x_label="step", marks={1500: "stage 2"}, level=(3.0, "chance"))
    faint, smooth = figure.axes[0].lines[:2]
    assert len(faint.get_xdata()) == len(smooth.get_xdata()) == 300
    # Neither means of stretches nor the running mean bend a straight line, away from its ends.
    for drawn in (faint, smooth):
        np.testing.assert_allclose(drawn.get_ydata()[7:-7], 5 - drawn.get_xdata()[7:-7] / 1000)
    assert {text.get_text().strip() for text in figure.axes[0].texts} == {"stage 2", "chance"}
    np.testing.assert_allclose(drawing.running_mean(np.array([1.0, 2.0]), 5), [1.5, 1.5])


def test_pictures_follow_light_and_dark_and_are_the_same_every_time():
    line = drawing.Line((np.arange(3.0), np.arange(3.0)), "angular_velocity")
    pictures = [drawing.draw_svg(drawing.line_panel([line], x_label="a & b")) for _ in range(2)]
    assert pictures[0] == pictures[1]
    text = svg_of(pictures[0].address)
    light, dark = drawing.COLOURS["angular_velocity"]
    assert "var(--angular-velocity)" in text
    assert "@media(prefers-color-scheme:dark){:root{" in text
    assert text.count(light) == 1
    assert text.count(dark) == 1
    assert "a &amp; b" in text
    assert len({light for light, _dark in drawing.COLOURS.values()}) == len(drawing.COLOURS)


def test_hardware_is_in_words():
    assert re.search(r"\d+ cores?, \d+ threads", facts.hardware())


def test_embedding_leaves_out_modalities_that_are_alike(tmp_path, runs):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    path = run / "checkpoints" / "last.pt"
    checkpoint = checkpoints.load(path)
    checkpoint["model"]["student_encoders.input_norm.weight"][0] = 0  # joint sees nothing
    checkpoints.save(path, checkpoint)
    (plot,) = page_of([embedding.render], [run], embedding="modalities").plots()
    assert list(plot) == ["all", "motion", "bone"]
