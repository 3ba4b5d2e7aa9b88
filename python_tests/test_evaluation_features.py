"""Feature extraction leaves the module as it was and does not depend on how the clips are cut into batches."""

from __future__ import annotations

import pytest
import torch
from evaluation_helpers import small_ikem, write_clip_set

from ikem_fast import MODALITIES
from ikem_fast.evaluation import extract
from ikem_fast.methods import RelationalDistillation
from ikem_fast.quirks import Quirks


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory):
    return write_clip_set(tmp_path_factory.mktemp("data") / "prepared")


def test_rows_and_names(clip_set):
    method = small_ikem()
    features = extract(method, clip_set, batch_size=7)
    assert features.features.shape == (6, 24, 8)
    assert features.features.dtype == torch.float32
    assert features.names == MODALITIES
    assert features.sample_names == tuple(clip_set.names)
    assert features.labels.tolist() == clip_set.labels.tolist()


def test_batch_size_does_not_matter(clip_set):
    method = small_ikem(modalities=("joint", "angular_velocity"))
    one = extract(method, clip_set, batch_size=24).features
    torch.testing.assert_close(extract(method, clip_set, batch_size=5).features, one, rtol=1e-5, atol=1e-6)


def test_module_and_random_state_are_left_as_they_were(clip_set):
    method = small_ikem()
    method.train()
    method.query_encoders.blocks[3].eval()
    modes = [module.training for module in method.modules()]
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    random_state = torch.get_rng_state()
    features = extract(method, clip_set)
    assert [module.training for module in method.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not features.features.requires_grad
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_modes_are_restored_after_an_error(clip_set):
    method = small_ikem()
    method.train()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract(method, clip_set, batch_size=0)
    broken = small_ikem(layout="ntu-rgb+d")
    broken.train()
    with pytest.raises(ValueError, match="25"):
        extract(broken, clip_set)
    assert all(module.training for module in broken.modules())


def test_frame_count_follows_the_quirk(clip_set):
    features = {}
    for file_frame_count in (True, False):
        method = small_ikem(modalities=("motion",), quirks=Quirks(file_frame_count=file_frame_count))
        features[file_frame_count] = extract(method, clip_set).features
        batch = clip_set.batch(range(len(clip_set)), file_frame_count=file_frame_count)
        with torch.no_grad():
            expected = method.eval().features(batch.clips, batch.num_frames)
        torch.testing.assert_close(features[file_frame_count], expected)
    assert not torch.equal(features[True], features[False])


def test_parts_of_a_distillation(clip_set):
    teacher = small_ikem()
    distillation = RelationalDistillation.from_teacher(teacher)
    student = extract(distillation, clip_set, part="student")
    assert student.names == ("joint", "motion", "bone")
    assert torch.equal(extract(distillation, clip_set).features, student.features)
    of_teacher = extract(distillation, clip_set, part="teacher")
    assert of_teacher.names == MODALITIES
    torch.testing.assert_close(of_teacher.features, extract(teacher, clip_set).features)
