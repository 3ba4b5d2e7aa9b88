"""Random parameters of views: Philox, its use, and the compiled operator against the definition, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

from ikem_fast.ops import AugmentationConfig, ViewParameters, draw_augmentation, draw_views, draw_views_reference
from ikem_fast.ops.draw_views import philox

EVERYTHING = AugmentationConfig(camera_view=1.0, motion_scale=True)
FIELDS = ("crop_start", "shear", "camera_scale", "camera_angles", "motion_scale")


def assert_same(ours, expected):
    assert ours.crop_padding_ratio == expected.crop_padding_ratio
    for name in FIELDS:
        first, second = getattr(ours, name), getattr(expected, name)
        assert (first is None) == (second is None), name
        if first is not None:
            assert first.dtype == second.dtype
            assert torch.equal(first, second), name


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_vectors_of_its_authors(counter, seed, expected):
    assert [int(word) for word in philox([torch.tensor(word) for word in counter], seed)] == expected


@pytest.mark.parametrize(
    "config",
    [
        AugmentationConfig(),
        EVERYTHING,
        AugmentationConfig(0, 0.0),
        AugmentationConfig(3, 0.1, camera_view=0.3),
        AugmentationConfig(0, 0.0, motion_scale=True),
    ],
)
def test_operator_gives_the_bits_of_the_definition(config, capability):
    indices = torch.randint(2**32, (1100,), generator=torch.Generator().manual_seed(0))
    for seed, epoch, num_frames, num_views in ((0, 0, 50, 2), (2**64 - 1, 2**32 - 1, 7, 1), (2**63, 17, 300, 3)):
        arguments = (seed, epoch, indices, num_frames, config, num_views)
        assert_same(draw_views(*arguments), draw_views_reference(*arguments))


def test_bits_never_change():
    """Also checked for the CUDA kernel, in csrc/testing/test_draw_views.cpp; a change makes runs unrepeatable."""
    drawn = draw_views(0x0123456789ABCDEF, 300, torch.tensor([7, 4000000000, 7]), 50, EVERYTHING)
    assert drawn.crop_start.tolist() == [[0, 6, 0], [4, 15, 4]]
    words = [0xBE7A9298, 0xBEF7188E, 0xBE42848C, 0x3E4DEE18, 0x3E13649C, 0xBECEED5E]
    assert [bits % 2**32 for bits in drawn.shear[1, 1].view(torch.int32).flatten().tolist()] == words


def test_a_sample_has_its_parameters_in_any_batch():
    indices = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    together = draw_views(3, 9, indices, 50, EVERYTHING)
    for part in (indices[:1], indices[100:117], indices.flip(0), indices[[5, 5, 5]]):
        places = torch.tensor([indices.tolist().index(sample) for sample in part.tolist()])
        alone = draw_views(3, 9, part, 50, EVERYTHING)
        for name in FIELDS:
            assert torch.equal(getattr(alone, name), getattr(together, name)[:, places])


def test_seed_epoch_sample_and_view_all_matter():
    base = draw_views(1, 2, torch.arange(64), 50, EVERYTHING, num_views=3)
    others = [
        draw_views(2, 2, torch.arange(64), 50, EVERYTHING, num_views=3).shear,
        draw_views(1 + 2**32, 2, torch.arange(64), 50, EVERYTHING, num_views=3).shear,
        draw_views(1, 3, torch.arange(64), 50, EVERYTHING, num_views=3).shear,
        draw_views(1, 2, torch.arange(64, 128), 50, EVERYTHING, num_views=3).shear,
        base.shear.roll(1, dims=0),
        base.shear.flip(2),
    ]
    for other in others:
        assert (other == base.shear).float().mean() < 0.01
    # Turning one augmentation on leaves the draws of the others alone, and more views leave the first ones alone.
    assert torch.equal(draw_views(1, 2, torch.arange(64), 50, AugmentationConfig()).shear, base.shear[:2])


def test_draws_are_uniform():
    drawn = draw_views(11, 0, torch.arange(20000), 50, EVERYTHING, num_views=2)
    counts = drawn.crop_start.flatten().bincount(minlength=17)
    assert counts.shape == (17,)
    assert ((counts - 40000 / 17).square() / (40000 / 17)).sum() < 45  # chi-square of 16 degrees: 1 in 7000 above it
    angle = math.pi / 6
    for values, low, high in (
        (drawn.shear, -0.5, 0.5),
        (drawn.camera_scale, 0.5, 1.5),
        (drawn.camera_angles, -angle, angle),
        (drawn.motion_scale, -2.0, 3.0),
    ):
        share = (values.double().flatten() - low) / (high - low)
        assert share.min() >= 0
        assert share.max() <= 1 + 1e-7
        edges = share.sort().values - torch.linspace(0, 1, share.numel(), dtype=torch.float64)
        assert edges.abs().max() < 2.2 / math.sqrt(share.numel())  # Kolmogorov and Smirnov: 1 in 8000 above it
    # No two of a sample's numbers, or its views, go together.
    columns = torch.cat([*drawn.shear.flatten(2).unbind(0), *drawn.camera_angles.unbind(0)], dim=1).T
    assert (torch.corrcoef(columns) - torch.eye(18)).abs().max() < 0.035


def test_parameters_of_one_view_and_back():
    generator = torch.Generator().manual_seed(0)
    views = [draw_augmentation(4, 50, EVERYTHING, generator) for _ in range(2)]
    stacked = ViewParameters.stack(views)
    assert stacked.shear.shape == (2, 4, 2, 3)
    for number, view in enumerate(views):
        back = stacked.view(number)
        for name in ("crop_start", "shear_first", "shear_second", "camera_scale", "camera_angles", "motion_scale"):
            assert torch.equal(getattr(back, name), getattr(view, name))
    assert ViewParameters.stack([ViewParameters().view(0)]) == ViewParameters()


@pytest.mark.parametrize("function", [draw_views, draw_views_reference])
def test_epoch_may_be_a_tensor(function):
    """It is read when the numbers are drawn, not when the tensor was made."""
    indices, epoch = torch.arange(20), torch.zeros(1, dtype=torch.int64)
    for number in (0, 17, 2**32 - 1):
        epoch.fill_(number)
        assert_same(function(3, epoch, indices, 50, EVERYTHING), function(3, number, indices, 50, EVERYTHING))


def test_empty_batch():
    drawn = draw_views(0, 0, torch.arange(0), 50, AugmentationConfig())
    assert drawn.crop_start.shape == (2, 0)
    assert_same(drawn, draw_views_reference(0, 0, torch.arange(0), 50, AugmentationConfig()))


def test_operator_is_registered_completely():
    arguments = (torch.arange(4), 5, torch.tensor([6]), 2, 50, 6, 0.5, 0.0)
    torch.library.opcheck(torch.ops.ikem_fast.draw_views.default, arguments)


@pytest.mark.parametrize("function", [draw_views, draw_views_reference])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.arange(3).int()}, r"indices must be \(B,\) int64, got \(3,\) int32"),
        ({"indices": torch.zeros(2, 2).long()}, r"indices must be \(B,\) int64, got \(2, 2\) int64"),
        ({"indices": torch.tensor([0, -1])}, r"indices must be 0 \.\.\. 2\^32 - 1, got -1"),
        ({"seed": -1}, r"seed must be 0 \.\.\. 2\^64 - 1, got -1"),
        ({"seed": 2**64}, r"seed must be 0 \.\.\. 2\^64 - 1, got 18446744073709551616"),
        ({"epoch": -1}, r"epoch must be 0 \.\.\. 2\^32 - 1, got -1"),
        ({"epoch": 2**32}, r"epoch must be 0 \.\.\. 2\^32 - 1, got 4294967296"),
        ({"epoch": torch.tensor([-1])}, r"epoch must be 0 \.\.\. 2\^32 - 1, got -1"),
        ({"epoch": torch.tensor([2**32])}, r"epoch must be 0 \.\.\. 2\^32 - 1, got 4294967296"),
        ({"epoch": torch.tensor(1)}, r"epoch must be \(1,\) int64, got \(\) int64"),
        ({"epoch": torch.ones(1)}, r"epoch must be \(1,\) int64, got \(1,\) float32"),
        ({"epoch": torch.ones(1, device="meta").long()}, "epoch must be on the device of indices, cpu, got meta"),
        ({"num_frames": 0}, "num_frames must be above 0, got 0"),
        ({"num_views": 0}, r"num_views must be 1 \.\.\. 65535, got 0"),
    ],
)
def test_errors_name_the_argument(function, changes, message):
    arguments = {"seed": 0, "epoch": 0, "indices": torch.arange(3), "num_frames": 50, "config": EVERYTHING, **changes}
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.cuda
def test_cuda_gives_the_bits_of_the_definition():
    indices = torch.randint(2**32, (1000,), generator=torch.Generator().manual_seed(0))
    expected = draw_views_reference(5, 6, indices, 50, EVERYTHING)
    for epoch in (6, torch.tensor([6], device="cuda")):
        drawn = draw_views(5, epoch, indices.cuda(), 50, EVERYTHING)
        for name in FIELDS:
            assert torch.equal(getattr(drawn, name).cpu(), getattr(expected, name))


@pytest.mark.cuda
def test_epoch_comes_to_the_device_without_waiting():
    indices = torch.arange(20, device="cuda")
    draw_views(5, 6, indices, 50, EVERYTHING)  # libraries load
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function in (draw_views, draw_views_reference):
            function(5, 7, indices, 50, EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
