"""The report page: complete, valid, and with nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from evaluation_helpers import small_config, write_clip_set

from ikem_fast import MODALITIES, engine, layouts
from ikem_fast.evaluation import evaluate_run
from ikem_fast.evaluation.tables import Table
from ikem_fast.ops import derive_modalities_reference
from ikem_fast.report import figures, hardware, page, write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    clips = write_clip_set(folder / "clips").folder
    engine.pretrain(clips, folder / "teacher", small_config(), progress=False)
    engine.distill(None, folder / "teacher", folder / "student", small_config(), progress=False)
    return folder


class Balance(HTMLParser):
    """Checks that every tag is closed by its own, and notes what the page refers to."""

    EMPTY = ("meta", "img", "link", "br")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert "@import" not in text
    assert "url(" not in text
    for reference in balance.references:
        prefix = "data:image/png;base64,"
        assert reference.startswith(prefix)
        assert base64.b64decode(reference.removeprefix(prefix), validate=True).startswith(b"\x89PNG")
    return balance.references


def test_page_of_evaluated_runs(tmp_path, runs):
    few = ["epochs=2", "linear.milestones=[]"]
    evaluate_run("linear", runs / "student", overrides=few, untrained=True, progress=False)
    evaluate_run("knn", runs / "student", progress=False)
    out = write_report(
        [runs / "teacher", runs / "student"], tmp_path / "page.html", title="A <title>", phases=[("a phase", 75.0)]
    )
    text = out.read_text(encoding="utf-8")
    # bars, modalities, two loss curves, two kNN curves, two confusion matrices
    assert len(check_page(text)) == 1 + 1 + 2 + 2 + 2
    assert "A &lt;title&gt;" in text
    for words in ("Accuracy", "The six modalities of one clip", "Pretraining", "Distillation", "1 min 15 s"):
        assert words in text
    assert "Confusion of the student encoders" in text
    assert "Confusion of the untrained encoders" not in text
    assert "hidden_channels: 2" in text
    assert not list(tmp_path.glob(".*"))


def test_page_of_a_run_that_was_not_evaluated(tmp_path, runs):
    out = write_report([runs / "teacher"], tmp_path / "page.html", sample="clip003")
    text = out.read_text(encoding="utf-8")
    assert len(check_page(text)) == 3
    assert "Clip clip003, action “action 0”" in text


def test_page_says_what_the_log_notes(tmp_path, runs):
    run = shutil.copytree(runs / "teacher", tmp_path / "run")
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "note", "epoch": 1, "step": 0, "text": "steps are <not> captured"}\n' * 2)
    text = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<p>Steps are &lt;not&gt; captured.</p>") == 1


def test_mistakes(tmp_path, runs):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "page.html")
    with pytest.raises(ValueError, match="got 'clip999'"):
        write_report([runs / "teacher"], tmp_path / "page.html", sample="clip999")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ntu-rgb+d", "nw-ucla", "utd-mhad"])
def test_modality_picture_of_every_layout(name):
    layout = layouts.get(name)
    clip = torch.randn(1, 3, 12, layout.num_joints, 2, generator=torch.Generator().manual_seed(0))
    clip[..., 1] = 0
    modalities = derive_modalities_reference(clip, torch.tensor([40]), layout, MODALITIES)[:, 0].numpy()
    figure = figures.modality_picture(modalities, MODALITIES, layout, num_columns=4)
    # One panel per modality and frame, one map per modality with its colour bar.
    assert len(figure.axes) == 6 * (4 + 2)
    assert base64.b64decode(figures.draw(figure, 30).base64).startswith(b"\x89PNG")


def test_modality_picture_of_a_clip_of_one_frame_without_motion():
    layout = layouts.get("nw-ucla")
    clip = torch.zeros(1, 3, 1, 20, 1)
    modalities = derive_modalities_reference(clip, torch.tensor([1]), layout, MODALITIES)[:, 0].numpy()
    figure = figures.modality_picture(modalities, MODALITIES, layout)
    assert base64.b64decode(figures.draw(figure, 30).base64).startswith(b"\x89PNG")


def test_loss_curves_have_a_panel_per_kind_and_a_line_per_modality():
    steps, values = np.arange(50), np.linspace(5, 1, 50)
    names = ("single/joint", "single/bone", "context/joint", "exchange/joint")
    figure = figures.loss_curves(dict.fromkeys(names, (steps, values)))
    assert [len(axes.get_legend().get_texts()) for axes in figure.axes] == [2, 1, 1]
    line = figure.axes[0].lines[1]
    # The running mean keeps a straight line straight away from its ends.
    np.testing.assert_allclose(line.get_ydata()[5:-5], values[5:-5])


def test_confusion_shows_shares_of_the_true_class():
    figure = figures.confusion(np.array([[3, 1], [0, 0]]), ["wave", "kick"])
    texts = {(text.get_position(), text.get_text()) for text in figure.axes[0].texts}
    assert texts == {((0, 0), "75"), ((1, 0), "25")}
    big = figures.confusion(np.eye(60), [f"action {number}" for number in range(60)])
    assert not big.axes[0].texts


def test_table_in_html():
    text = page.table(Table(("a", "b"), (("x", 0.5), ("x", None), ("<y>", 1.0))))
    assert text.count("class=group") == 1
    assert "&lt;y&gt;" in text
    assert re.findall(r"<td class=number>([^<]*)</td>", text) == ["50.0", "-", "100.0"]


def test_hardware_is_in_words():
    assert re.search(r"\d+ cores?, \d+ threads", hardware())
