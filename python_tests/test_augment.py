import math

import pytest
import reference_vectors as vectors
import torch

from ikem_fast import ops

DRAWS = range(4)


@pytest.fixture(scope="module")
def release():
    return vectors.load("augmentations.npz")


@pytest.fixture(scope="module")
def clip(release):
    return torch.tensor(release["input"]).unsqueeze(0)


def parameter(release, name):
    return torch.tensor(release[name]).unsqueeze(0)


@pytest.mark.parametrize("draw", DRAWS)
def test_release_temporal_crop(release, clip, draw):
    cropped = ops.temporal_crop(clip, parameter(release, f"crop{draw}/start"))
    assert torch.equal(cropped[0], torch.tensor(release[f"crop{draw}/output"]))


@pytest.mark.parametrize("draw", DRAWS)
def test_release_shear(release, clip, draw):
    sheared = ops.shear(clip, parameter(release, f"shear{draw}/s1"), parameter(release, f"shear{draw}/s2"))
    assert vectors.relative_error(sheared[0], release[f"shear{draw}/output"]) < 1e-6


@pytest.mark.parametrize("draw", DRAWS)
def test_release_camera_view(release, clip, draw):
    scale, angles = parameter(release, f"camera{draw}/scale"), parameter(release, f"camera{draw}/angles")
    assert vectors.relative_error(ops.camera_view(clip, scale, angles)[0], release[f"camera{draw}/output"]) < 1e-6


@pytest.mark.parametrize("draw", DRAWS)
def test_release_motion_scale(release, clip, draw):
    scaled = ops.motion_scale(clip, parameter(release, f"motion_scale{draw}/scale"))
    assert vectors.relative_error(scaled[0], release[f"motion_scale{draw}/output"]) < 1e-6


def test_every_clip_has_its_own_parameters():
    generator = torch.Generator().manual_seed(3)
    clips = torch.randn(5, 3, 13, 7, 2, generator=generator)
    config = ops.AugmentationConfig(camera_view=1.0, motion_scale=True)
    drawn = ops.draw_augmentation(5, 13, config, generator)
    together = ops.augment(clips, drawn)
    fields = ("crop_start", "shear_first", "shear_second", "camera_scale", "camera_angles", "motion_scale")
    for n in range(5):
        own = ops.AugmentationParameters(**{name: getattr(drawn, name)[n : n + 1] for name in fields})
        torch.testing.assert_close(ops.augment(clips[n : n + 1], own)[0], together[n])


def test_draws_are_within_their_ranges_and_reach_the_ends_of_the_crop():
    config = ops.AugmentationConfig(camera_view=0.5, motion_scale=True)
    drawn = ops.draw_augmentation(4000, 50, config, torch.Generator().manual_seed(0))
    assert set(drawn.crop_start.tolist()) == set(range(17))
    for values, low, high in (
        (drawn.shear_first, -0.5, 0.5),
        (drawn.shear_second, -0.5, 0.5),
        (drawn.camera_scale, 0.25, 0.75),
        (drawn.camera_angles, -math.pi / 12, math.pi / 12),
        (drawn.motion_scale, -2.0, 3.0),
    ):
        assert low <= values.min()
        assert values.max() <= high
        assert values.max() - values.min() > 0.95 * (high - low)


def test_the_same_generator_state_draws_the_same():
    first, second = (
        ops.draw_augmentation(3, 50, ops.AugmentationConfig(), torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first.crop_start, second.crop_start)
    assert torch.equal(first.shear_first, second.shear_first)


def test_everything_off_leaves_the_clip():
    clips = torch.randn(2, 3, 5, 4, 1)
    drawn = ops.draw_augmentation(2, 5, ops.AugmentationConfig(0, 0.0), torch.Generator())
    assert ops.augment(clips, drawn) is clips


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_short_clips(num_frames):
    clips = torch.randn(2, 3, num_frames, 4, 1)
    config = ops.AugmentationConfig(camera_view=1.0, motion_scale=True)
    augmented = ops.augment(clips, ops.draw_augmentation(2, num_frames, config, torch.Generator()))
    assert augmented.shape == clips.shape
    assert augmented.isfinite().all()


def test_wrong_arguments_are_named():
    clips = torch.randn(2, 3, 6, 4, 1)
    with pytest.raises(ValueError, match=r"clips must be \(N, C, T, V, M\) floating point, got \(3, 6\) float32"):
        ops.temporal_crop(torch.zeros(3, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"start must be \(2,\) int64, got \(3,\) int64"):
        ops.temporal_crop(clips, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"second must be \(N, 3\) = \(2, 3\) floating point, got \(2, 2\) float32"):
        ops.shear(clips, torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="padding_ratio must be at least 1, got 0"):
        ops.temporal_crop(clips, torch.zeros(2, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="must be 0 or more"):
        ops.AugmentationConfig(shear=-0.1)
