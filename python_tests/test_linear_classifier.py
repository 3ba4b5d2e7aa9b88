import pytest
import reference_vectors as vectors
import torch

from ikem_fast import MODALITIES, load_reference
from ikem_fast.evaluation import LinearClassifier


@pytest.fixture(scope="module")
def release():
    return vectors.load("linear_eval.npz")


@pytest.fixture(scope="module")
def classifier(release):
    return load_reference(vectors.state_dict(release))


@pytest.mark.parametrize("view", [*MODALITIES, "all", "3views"])
@torch.no_grad()
def test_release_logits(release, classifier, view):
    logits = classifier(torch.tensor(release["input"]), torch.tensor(release["num_frames"]), view=view)
    assert vectors.relative_error(logits, release[f"logits/{view}"]) < 1e-5


@torch.no_grad()
def test_several_modalities_are_averaged(release, classifier):
    inputs = torch.tensor(release["input"]), torch.tensor(release["num_frames"])
    together = classifier(*inputs, view=("motion", "bone"))
    torch.testing.assert_close(together, (classifier(*inputs, "motion") + classifier(*inputs, "bone")) / 2)


def test_unknown_views_are_named(release, classifier):
    inputs = torch.tensor(release["input"]), torch.tensor(release["num_frames"])
    with pytest.raises(ValueError, match=r"view must be one of all, 3views, joint, .*, got 'joints'"):
        classifier(*inputs, view="joints")
    joint_only = LinearClassifier("ntu-rgb+d", ("joint",), num_classes=3, hidden_channels=2, feature_size=4)
    with pytest.raises(ValueError, match="got '3views'"):
        joint_only(*inputs, view="3views")
