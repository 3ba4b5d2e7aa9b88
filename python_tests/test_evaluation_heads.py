"""Linear heads in files: what is kept of an evaluation, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ikem_fast import safetensors_file
from ikem_fast.engine import load_run
from ikem_fast.evaluation import extract, load_heads, load_scores
from ikem_fast.evaluation.heads import HEADS_FILE, mean_logits
from ikem_fast.safetensors_file import TensorFileError


@pytest.fixture
def heads_file(trained_runs):
    return trained_runs.student / "evaluation" / HEADS_FILE


@pytest.fixture
def copy(heads_file, tmp_path):
    path = tmp_path / HEADS_FILE
    path.write_bytes(heads_file.read_bytes())
    return path


def test_heads_are_those_that_gave_the_scores(trained_runs, heads_file):
    method, checkpoint = load_run(trained_runs.student)
    test_set = trained_runs.clip_set.split("test")
    scores = load_scores(trained_runs.student / "evaluation" / "linear_scores.npz")
    of_parts = load_heads(heads_file)
    # No file holds the untrained encoders that were evaluated beside them.
    assert list(of_parts) == ["student", "teacher"]
    for part, heads in of_parts.items():
        features = extract(method, test_set, part=part)
        assert heads.class_names == trained_runs.clip_set.class_names
        assert list(heads.views)[-1] == "all"
        assert heads.training["step"] == checkpoint["step"]
        assert heads.training["seed"] == 0
        assert heads.training["recipe"]["learning_rate"] == 5
        assert heads.training["data"]["preparation"] == checkpoint["data"]["preparation"]
        for view, modalities in heads.views.items():
            rows = [features.names.index(name) for name in modalities]
            logits = mean_logits(features.features[rows], heads.weights[view], heads.biases[view])
            np.testing.assert_allclose(logits, scores.logits[f"{part}/{view}"], rtol=1e-4, atol=1e-5)


def test_mean_logits():
    features, weights, biases = torch.randn(2, 5, 3), torch.randn(2, 4, 3), torch.randn(2, 4)
    expected = sum(features[row] @ weights[row].T + biases[row] for row in range(2)) / 2
    torch.testing.assert_close(mean_logits(features, weights, biases), expected)


def test_every_flipped_bit_is_found(copy):
    whole = copy.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in (0, 9, header // 2, header + 3, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        copy.write_bytes(damaged)
        with pytest.raises(TensorFileError, match=HEADS_FILE):
            load_heads(copy)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_cut_short(copy, length):
    copy.write_bytes(copy.read_bytes()[:length])
    with pytest.raises(TensorFileError, match="is damaged or no safetensors file"):
        load_heads(copy)


def test_other_files(copy, tmp_path):
    with pytest.raises(TensorFileError, match=r"no\.safetensors does not exist"):
        load_heads(tmp_path / "no.safetensors")
    save_file({"a": torch.zeros(2)}, copy)
    with pytest.raises(TensorFileError, match="must be of the format 'ikem_fast linear heads', got None"):
        load_heads(copy)
    safetensors_file.write(copy, "ikem_fast linear heads", 2, {}, {})
    with pytest.raises(TensorFileError, match="must have format version 1, got 2"):
        load_heads(copy)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "all.weight must be float32 of 1 heads, got nothing"),
        ({"x/all.weight": torch.zeros(1, 3, 8)}, r"got \(1, 3, 8\)"),
        ({"x/all.weight": torch.zeros(1, 2, 8).double()}, "torch.float64"),
        ({"x/all.weight": torch.zeros(1, 2, 8)}, "all.bias must be float32 of 1 heads, got nothing"),
    ],
)
def test_tensors_that_are_not_as_described(copy, tensors, message):
    description = {"class_names": ["a", "b"], "views": {"all": ["joint"]}, "training": {}}
    safetensors_file.write(copy, "ikem_fast linear heads", 1, tensors, {"encoders": {"x": description}})
    with pytest.raises(TensorFileError, match=message):
        load_heads(copy)
    safetensors_file.write(copy, "ikem_fast linear heads", 1, tensors, {"encoders": {"x": {"views": {}}}})
    with pytest.raises(TensorFileError, match="description is incomplete"):
        load_heads(copy)
