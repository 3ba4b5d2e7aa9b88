"""Views of stored clips: the compiled operator, its plain definition, and the vectors of the authors' release."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import reference_vectors
import torch

from ikem_fast import _extension, layouts, modalities
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops import (
    AugmentationConfig,
    ViewParameters,
    augment,
    clip_views,
    clip_views_reference,
    derive_modalities_reference,
    draw_views,
)

EVERYTHING = AugmentationConfig(camera_view=1.0, motion_scale=True)
# Relative to the largest magnitude of a modality.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ANGULAR_VELOCITY = MODALITIES.index("angular_velocity")


def make_set(num_clips=5, num_frames=50, num_joints=25, num_persons=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(num_clips, 3, num_frames, num_joints, num_persons, generator=generator, dtype=torch.float64)
    return clips.to(dtype), torch.randint(10, 300, (num_clips,), generator=generator)


def draw(clips, indices=None, config=EVERYTHING, num_views=2, epoch=0):
    samples = torch.arange(clips.shape[0]) if indices is None else indices
    return draw_views(1, epoch, samples, clips.shape[2], config, num_views)


def relative_errors(ours, expected):
    """For each modality the largest difference over its largest magnitude; infinite where shapes or NaNs differ."""
    if ours.views.shape != expected.views.shape or ours.views.dtype != expected.views.dtype:
        return [float("inf")]
    errors = []
    for one, other in zip(ours.views.transpose(0, 1), expected.views.transpose(0, 1), strict=True):
        one, other = one.double(), other.double()
        same_nans = torch.equal(one.isnan(), other.isnan())
        one, other = one.nan_to_num(), other.nan_to_num()
        scale = float(other.abs().amax()) if other.numel() else 0.0
        difference = float((one - other).abs().amax()) if other.numel() else 0.0
        errors.append(difference / max(scale, 1e-30) if same_nans else float("inf"))
    return errors


def assert_agree(ours, expected, tolerance, axis_tolerance=None):
    """``axis_tolerance`` is for angular velocity, whose axis loses digits where neighbouring bones are nearly parallel:
    there the coordinates' rounding is divided by sin(theta), of which the smallest in these clips is some 1e-2.
    """
    errors = relative_errors(ours, expected)
    names = list(MODALITIES) if len(errors) == len(MODALITIES) else [""] * len(errors)
    for name, error in zip(names, errors, strict=True):
        allowed = axis_tolerance if axis_tolerance and name == "angular_velocity" else tolerance
        assert error <= allowed, f"{name or 'a modality'} is off by {error:.2e}, at most {allowed:.1e}"


def summed(views):
    exact = views.double()
    return torch.stack([exact.sum(dim=(2, 3)), exact.square().sum(dim=(2, 3))])


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("function", [clip_views, clip_views_reference])
def test_agrees_with_the_modalities_of_the_release(function, name):
    vectors = reference_vectors.load("modalities.npz")
    clips, num_frames = torch.from_numpy(vectors["input"]), torch.from_numpy(vectors["num_frames"])
    ours = function(clips, num_frames, modalities=[name]).views[0, 0]
    # Channels last, persons split: (N·M, T, V, C) to (N, C, T, V, M).
    ours = ours.unflatten(0, (clips.shape[0], -1)).permute(0, 4, 2, 3, 1)
    assert reference_vectors.relative_error(ours, vectors[name]) < 1e-6


@pytest.mark.parametrize("draw_number", range(4))
@pytest.mark.parametrize("function", [clip_views, clip_views_reference])
def test_agrees_with_the_augmentations_of_the_release(function, draw_number):
    vectors = reference_vectors.load("augmentations.npz")

    def number(name):
        return torch.tensor(vectors[name.replace("#", str(draw_number))])

    shear = torch.stack([number("shear#/s1"), number("shear#/s2")])[None, None].float()
    for kind, parameters in (
        ("crop", ViewParameters(crop_start=number("crop#/start").reshape(1, 1))),
        ("shear", ViewParameters(shear=shear)),
        (
            "camera",
            ViewParameters(
                camera_scale=number("camera#/scale").reshape(1, 1).float(),
                camera_angles=number("camera#/angles").reshape(1, 1, 3).float(),
            ),
        ),
        ("motion_scale", ViewParameters(motion_scale=number("motion_scale#/scale").reshape(1, 1).float())),
    ):
        clip = torch.tensor(vectors["input"]).unsqueeze(0)
        ours = function(clip, torch.tensor([50]), parameters=parameters, modalities=["joint"]).views[0, 0]
        wanted = vectors[f"{kind}{draw_number}/output"]  # (C, T, V, M)
        assert reference_vectors.relative_error(ours.permute(3, 1, 2, 0), wanted) < 1e-6, kind


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["ntu-rgb+d", "nw-ucla", "utd-mhad"])
def test_operator_agrees_with_definition(stored, layout):
    clips, num_frames = make_set(num_joints=layouts.get(layout).num_joints, dtype=stored)
    indices = torch.tensor([4, 0, 3, 3])
    parameters = draw(clips, indices)
    dtypes = (torch.float64,) if stored == torch.float64 else (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        ours = clip_views(clips, num_frames, indices, parameters, layout, dtype=dtype)
        expected = clip_views_reference(clips, num_frames, indices, parameters, layout, dtype=dtype)
        assert ours.views.is_contiguous()
        rounding = TOLERANCE[dtype]
        assert_agree(ours, expected, rounding, axis_tolerance=max(rounding, 1e-4 if dtype == torch.float32 else 1e-11))
        assert torch.allclose(ours.statistics, summed(ours.views), rtol=1e-12, atol=1e-9)


def test_layout_of_the_result():
    clips, num_frames = make_set(num_clips=3, num_persons=2)
    parameters = draw(clips)
    views = clip_views(clips, num_frames, parameters=parameters).views
    assert views.shape == (2, 6, 3 * 2, 50, 25, 3)
    for view in range(2):
        augmented = augment(clips, parameters.view(view))
        joints = augmented.permute(0, 4, 2, 3, 1).flatten(0, 1)  # row n·M + m
        assert torch.allclose(views[view, 0], joints, atol=1e-5)


def test_float64_is_the_composition_of_the_definitions():
    clips, num_frames = make_set(dtype=torch.float64)
    indices = torch.tensor([2, 2, 1])
    drawn = draw(clips, indices)
    floats = {name: values.double() for name, values in vars(drawn).items() if torch.is_tensor(values)}
    parameters = replace(drawn, **{**floats, "crop_start": drawn.crop_start})
    expected = []
    for view in range(2):
        augmented = augment(clips[indices], parameters.view(view))
        derived = derive_modalities_reference(augmented, num_frames[indices])
        expected.append(derived.permute(0, 1, 5, 3, 4, 2).flatten(1, 2))
    expected = torch.stack(expected)
    ours = clip_views(clips, num_frames, indices, parameters).views
    assert (ours - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("num_persons", [1, 2, 3])
def test_every_instruction_set_agrees(capability, num_persons):
    for dtype in (torch.float32, torch.float64):
        clips, num_frames = make_set(num_persons=num_persons, dtype=dtype)
        parameters = draw(clips)
        ours = clip_views(clips, num_frames, parameters=parameters)
        expected = clip_views_reference(clips, num_frames, parameters=parameters)
        assert_agree(ours, expected, TOLERANCE[dtype], axis_tolerance=1e-4 if dtype == torch.float32 else 1e-11)
        assert torch.allclose(ours.statistics, summed(ours.views), rtol=1e-12, atol=1e-9)
    half = clips.to(torch.float16)
    for view_dtype in (torch.bfloat16, torch.float16):
        ours = clip_views(half, num_frames, parameters=parameters, dtype=view_dtype)
        expected = clip_views_reference(half, num_frames, parameters=parameters, dtype=view_dtype)
        assert_agree(ours, expected, TOLERANCE[view_dtype])
        assert torch.allclose(ours.statistics, summed(ours.views), rtol=1e-12, atol=1e-9)


ODD_SIZES = (
    (1, 1, 25, 1),
    (1, 2, 25, 2),
    (3, 3, 20, 2),
    (2, 21, 5, 1),
    (1, 64, 33, 5),
    (9, 41, 20, 4),
    (1, 7, 700, 1),
    (1, 3, 3, 40),
)


@pytest.mark.parametrize(("num_clips", "num_frames", "num_joints", "num_persons"), ODD_SIZES)
def test_odd_sizes(num_clips, num_frames, num_joints, num_persons):
    layout = layouts.from_dict(
        {
            "name": "chain",
            "joints": [str(joint) for joint in range(num_joints)],
            "bones": {str(joint): str(joint // 2) for joint in range(1, num_joints)},
            "center": "0",
            "chest_normal": ["0", "1", "2"],
        }
    )
    for dtype in (torch.float64, torch.float32):
        clips, counts = make_set(num_clips, num_frames, num_joints, num_persons, dtype)
        for config in (EVERYTHING, AugmentationConfig(3, 0.0), AugmentationConfig(0, 0.0, motion_scale=True)):
            parameters = draw(clips, config=config)
            ours = clip_views(clips, counts, None, parameters, layout)
            expected = clip_views_reference(clips, counts, None, parameters, layout)
            assert_agree(ours, expected, TOLERANCE[dtype], axis_tolerance=2e-3 if dtype == torch.float32 else 1e-10)


def test_empty_batch():
    clips, num_frames = make_set()
    for stored, counts in ((clips, num_frames), (clips[:0], num_frames[:0])):
        none = torch.arange(0)
        for function in (clip_views, clip_views_reference):
            result = function(stored, counts, none, draw(stored, none), dtype=torch.bfloat16)
            assert result.views.shape == (2, 6, 0, 50, 25, 3)
            assert result.statistics.shape == (2, 2, 6, 25, 3)
            assert result.statistics.eq(0).all()


def test_every_subset_in_every_order():
    clips, num_frames = make_set(num_clips=2, num_frames=6)
    parameters = draw(clips)
    everything = clip_views(clips, num_frames, parameters=parameters)
    rows = {name: row for row, name in enumerate(MODALITIES)}
    orders = [order for size in range(1, 7) for order in itertools.permutations(MODALITIES, size)]
    for names in orders[::7] + orders[-1:] + [(name,) for name in MODALITIES]:
        ours = clip_views(clips, num_frames, parameters=parameters, modalities=names)
        chosen = [rows[name] for name in names]
        assert torch.equal(ours.views, everything.views[:, chosen])
        assert torch.equal(ours.statistics, everything.statistics[:, :, chosen])


def test_three_clips_of_a_set_and_the_same_on_its_own():
    clips, num_frames = make_set(num_clips=40)
    indices = torch.tensor([39, 0, 17])
    parameters = draw(clips, indices)
    ours = clip_views(clips, num_frames, indices, parameters)
    alone = clip_views(clips[indices], num_frames[indices], None, parameters)
    assert torch.equal(ours.views, alone.views)
    assert torch.equal(ours.statistics, alone.statistics)
    # A sample's views do not depend on the rest of the batch.
    one = clip_views(clips, num_frames, indices[1:2], draw(clips, indices[1:2]))
    assert torch.equal(one.views, ours.views[:, :, 2:4])


def test_statistics_do_not_depend_on_the_number_of_threads():
    clips, num_frames = make_set(num_clips=40, num_frames=20)
    parameters = draw(clips)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(clip_views(clips, num_frames, parameters=parameters))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result.views, results[0].views)
        assert torch.equal(result.statistics, results[0].statistics)


def test_statistics_are_those_of_the_input_norm():
    clips, num_frames = make_set(num_clips=6)
    clips = clips * 0.01 + 3.0  # a mean far above the deviation
    for dtype in (torch.float32, torch.bfloat16):
        result = clip_views(clips, num_frames, parameters=draw(clips), dtype=dtype)
        mean, variance = result.mean_and_variance()
        norm = torch.nn.BatchNorm1d(75, momentum=1.0, dtype=torch.float64)
        for view, modality in itertools.product(range(2), range(6)):
            # The encoder's input norm has channel 3 v + c.
            norm(result.views[view, modality].double().flatten(2).transpose(1, 2))
            assert torch.allclose(mean[view, modality].flatten(), norm.running_mean, rtol=1e-9, atol=1e-12)
            count = result.views.shape[2] * result.views.shape[3]
            unbiased = variance[view, modality].flatten() * count / (count - 1)
            assert torch.allclose(unbiased, norm.running_var, rtol=1e-6, atol=1e-12)
    without = clip_views(clips, num_frames, statistics=False)
    assert without.statistics is None
    assert torch.equal(without.views, clip_views(clips, num_frames).views)
    with pytest.raises(ValueError, match="statistics were not made"):
        without.mean_and_variance()


def test_set_with_any_stride_is_read_in_place():
    clips, num_frames = make_set(num_clips=12)
    parameters = draw(clips[::3])
    expected = clip_views(clips[::3].clone(), num_frames[::3].clone(), None, parameters)
    assert torch.equal(clip_views(clips[::3], num_frames[::3], None, parameters).views, expected.views)
    wide = torch.randn(4, 3 * 50 * 25 * 2 + 5)[:, 2:-3].unflatten(1, (3, 50, 25, 2))
    assert torch.equal(clip_views(wide, num_frames[:4]).views, clip_views(wide.contiguous(), num_frames[:4]).views)
    # One clip for all samples, without a copy of it.
    same = clips[:1].expand(5, -1, -1, -1, -1)
    views = clip_views(same, num_frames[:1].expand(5)).views
    assert torch.equal(views, views[:, :, :2].repeat(1, 1, 5, 1, 1, 1))


def test_absent_person_and_zero_length_bones_give_zeros():
    names = layouts.get("ntu-rgb+d").joint_names
    elbow, wrist = names.index("elbow_left"), names.index("wrist_left")
    for dtype in (torch.float32, torch.float64):
        clips, num_frames = make_set(dtype=dtype)
        clips[0, ..., 1] = 0  # no second person
        clips[1, :, :, wrist] = clips[1, :, :, elbow]
        clips[2] = 0
        parameters = draw(clips)
        ours = clip_views(clips, num_frames, parameters=parameters)
        assert_agree(
            ours, clip_views_reference(clips, num_frames, parameters=parameters), TOLERANCE[dtype],
            axis_tolerance=1e-4 if dtype == torch.float32 else 1e-11,
        )  # fmt: skip
        assert ours.views.isfinite().all()
        assert ours.views[:, :, 1].eq(0).all()
        assert ours.views[:, :, 4:6].eq(0).all()
        assert ours.views[:, 2, 2:4, :, wrist].eq(0).all()
        assert ours.views[:, 4:, 2:4, :, wrist].eq(0).all()


def test_nan_in_an_unused_person_stays_there():
    clips, num_frames = make_set(num_clips=3)
    parameters = draw(clips)
    expected = clip_views(clips, num_frames, parameters=parameters).views
    clips[..., 1] = float("nan")
    ours = clip_views(clips, num_frames, parameters=parameters)
    assert torch.equal(ours.views[:, :, 0::2], expected[:, :, 0::2])
    assert ours.views[:, 0, 1::2].isnan().all()
    reference = clip_views_reference(clips, num_frames, parameters=parameters)
    assert torch.equal(ours.views.isnan(), reference.views.isnan())


def test_angular_velocity_of_nearly_parallel_bones_is_bounded():
    """Without augmentation operator and definition differ by the rounding of angles alone, however small they are; the
    matrix of a view rounds coordinates, which turns the axis by that over sin(theta).
    """
    layout = layouts.from_dict(
        {
            "name": "chain",
            "joints": ["base", "middle", "end", "left", "right"],
            "bones": {"middle": "base", "end": "middle", "left": "base", "right": "base"},
            "center": "base",
            "chest_normal": ["middle", "left", "right"],
        }
    )
    generator = torch.Generator().manual_seed(3)
    clips, counts = make_set(64, 10, 5, 1)
    sizes = 10.0 ** -torch.randint(1, 8, (64, 1, 10, 1), generator=generator).float()
    bend = torch.randn(64, 3, 10, 1, generator=generator) * sizes
    direction = torch.where(torch.arange(64).view(-1, 1, 1, 1) % 2 == 0, 1.0, -1.0)  # near 0 and near pi
    clips[:, :, :, 0] = 0
    clips[:, :, :, 2] = clips[:, :, :, 1] + direction * (clips[:, :, :, 1] + bend)
    names = ["angular_velocity", "bone"]
    epsilon = torch.finfo(torch.float32).eps
    rate = (50 / counts.double()).view(-1, 1, 1)

    def velocity(function, coordinates, parameters=None):
        views = function(coordinates, counts, None, parameters, layout, names).views[0].double()
        return views[0, :, :-1, 2], views[1]

    ours, _ = velocity(clip_views, clips)
    definition, _ = velocity(clip_views_reference, clips)
    assert ((ours - definition).abs() / rate).max() < 16 * epsilon

    parameters = draw(clips, config=AugmentationConfig(0, 0.5), num_views=1)
    ours, _ = velocity(clip_views, clips, parameters)
    exact, bones = velocity(clip_views_reference, clips.double(), parameters)
    first, second = bones[:, :-1, 1], bones[:, :-1, 2]
    sine = second.cross(first, dim=2).norm(dim=2) / (first.norm(dim=2) * second.norm(dim=2))
    # Coordinates of the end joint are some times as long as the bones that are differences of them.
    turned = (64 * epsilon / sine).clamp_max(2).unsqueeze(2)
    allowed = 64 * epsilon + exact.norm(dim=2, keepdim=True) / rate * turned
    assert ((ours - exact).abs() / rate / allowed).max() < 1
    assert exact.abs().max() > 0.01


def test_chest_normal_can_be_left_out():
    clips, num_frames = make_set()
    root = layouts.get("ntu-rgb+d").root
    ours = clip_views(clips, num_frames, modalities=["bone"], chest_normal=False)
    expected = clip_views_reference(clips, num_frames, modalities=["bone"], chest_normal=False)
    assert_agree(ours, expected, TOLERANCE[torch.float32])
    assert ours.views[..., root, :].eq(0).all()
    assert clip_views(clips, num_frames, modalities=["bone"]).views[..., root, :].norm(dim=-1).sub(1).abs().max() < 1e-5


def test_rounds_to_nearest_even():
    clips = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20, 3e38, float("inf")])
    clips = clips.view(1, 1, 6, 1, 1).expand(1, 3, 6, 25, 1).contiguous()
    for dtype in (torch.bfloat16, torch.float16):
        ours = clip_views(clips, torch.tensor([50]), modalities=["joint"], dtype=dtype).views[0, 0, 0, :, 0, 0]
        assert torch.equal(ours, clips[0, 0, :, 0, 0].to(dtype))


def test_operator_is_registered_completely():
    clips, num_frames = make_set(num_clips=3, num_frames=6, num_joints=5, num_persons=1)
    drawn = draw(clips, torch.tensor([2, 0]))
    skeleton = ([2, 0, 2, 0, 2], [2, 0, 2, 0, 2], [4, 1, 3], [0, 1, 2, 3, 4, 5])
    operator = torch.ops.ikem_fast.clip_views.default
    for indices, parameters, dtype, statistics in (
        (
            torch.tensor([2, 0]),
            (drawn.crop_start, 1, drawn.shear, drawn.camera_scale, drawn.camera_angles, drawn.motion_scale),
            torch.bfloat16,
            True,
        ),
        (None, (None, 0, None, None, None, None), torch.float32, False),
    ):
        arguments = (clips, indices, num_frames, *parameters, *skeleton, 2, dtype, statistics)
        torch.library.opcheck(operator, arguments)
        on_meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]
        real, meta = operator(*arguments), operator(*on_meta)
        assert [(x.shape, x.dtype) for x in meta] == [(x.shape, x.dtype) for x in real]


def test_compiles_without_a_graph_break():
    clips, num_frames = make_set(num_clips=3, num_frames=6)

    def mean(indices):
        parameters = draw_views(1, 2, indices, 6, AugmentationConfig())
        return clip_views(clips, num_frames, indices, parameters).views.mean(dim=(2, 3))

    indices = torch.tensor([1, 2])
    assert torch.allclose(torch.compile(mean, fullgraph=True, backend="aot_eager")(indices), mean(indices))


def test_registered_modality_uses_the_definition(monkeypatch):
    monkeypatch.setattr(modalities, "_REGISTRY", dict(modalities._REGISTRY))
    modalities.register("mirrored", lambda clips, num_frames, layout, *, chest_normal=True: -clips)
    clips, num_frames = make_set()
    parameters = draw(clips)
    ours = clip_views(clips, num_frames, parameters=parameters, modalities=["mirrored", "joint"])
    assert torch.equal(ours.views[:, 0], -ours.views[:, 1])


GOOD = make_set(num_clips=2, num_frames=6)
DRAWN = draw(GOOD[0])


@pytest.mark.parametrize("function", [clip_views, clip_views_reference])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"clips": GOOD[0].int()}, ValueError, r"clips must be \(N, 3, T, V, M\) float32, float16, .* got .* int32"),
        ({"clips": GOOD[0][0]}, ValueError, r"clips must be \(N, 3, T, V, M\) .* got \(3, 6, 25, 2\) float32"),
        ({"clips": GOOD[0][..., :0]}, ValueError, "clips must have at least one frame, joint and person"),
        ({"clips": GOOD[0][:, :, ::2]}, ValueError, "clips must be contiguous within each clip"),
        ({"clips": GOOD[0].mT.contiguous().mT}, ValueError, "clips must be contiguous within each clip"),
        ({"clips": GOOD[0].clone().requires_grad_()}, ValueError, "clips must not require a gradient"),
        ({"num_frames": GOOD[1][:1]}, ValueError, r"num_frames must be \(2,\) integers, got \(1,\) int64"),
        ({"num_frames": GOOD[1].float()}, ValueError, r"num_frames must be \(2,\) integers, got \(2,\) float32"),
        ({"num_frames": GOOD[1].to("meta")}, ValueError, "num_frames must be on the clips' device cpu, got meta"),
        ({"indices": torch.tensor([0, 2])}, IndexError, r"indices must be 0 \.\.\. 1, got .*2"),
        ({"indices": torch.tensor([-1, 0])}, IndexError, r"indices must be 0 \.\.\. 1, got -1"),
        ({"indices": torch.tensor([0.0])}, ValueError, r"indices must be \(B,\) int64, got \(1,\) float32"),
        ({"indices": torch.tensor([[0]])}, ValueError, r"indices must be \(B,\) int64, got \(1, 1\) int64"),
        ({"indices": torch.tensor([0]).to("meta")}, ValueError, "indices must be on the clips' device cpu, got meta"),
        ({"parameters": draw(GOOD[0][:1])}, ValueError, r"crop_start must be \(2, 2\) int64, got \(2, 1\) int64"),
        (
            {"parameters": ViewParameters(shear=DRAWN.shear[..., 0])},
            ValueError,
            r"shear must be \(2, 2, 2, 3\) floating point, got \(2, 2, 2\)",
        ),
        (
            {"parameters": ViewParameters(motion_scale=torch.ones(1, 2).long())},
            ValueError,
            r"motion_scale must be \(1, 2\) floating point, got \(1, 2\) int64",
        ),
        (
            {"parameters": ViewParameters(crop_start=torch.tensor([[0, 3]]))},
            ValueError,
            r"crop_start must be 0 \.\.\. 2, got .*3",
        ),
        (
            {"parameters": ViewParameters(crop_start=torch.tensor([[0, 1]]), crop_padding_ratio=0)},
            ValueError,
            "crop_padding_ratio must be at least 1, got 0",
        ),
        ({"layout": "nw-ucla"}, ValueError, "clips must have the 20 joints of layout 'nw-ucla'"),
        ({"modalities": ["bones"]}, ValueError, r"got 'bones'; did you mean 'bone'\?"),
        ({"modalities": ("bone", "bone")}, ValueError, "modalities must be distinct, got bone, bone"),
        ({"dtype": torch.float64}, ValueError, r"dtype must be float64 for .* got float64 for .* float32"),
        ({"dtype": torch.int32}, ValueError, "dtype must be float64 for float64 clips .* got int32"),
        ({"clips": GOOD[0].double(), "dtype": torch.float32}, ValueError, "dtype must be float64 for float64 clips"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(function, changes, error, message):
    arguments = {"clips": GOOD[0], "num_frames": GOOD[1], **changes}
    with pytest.raises(error, match=message):
        function(**arguments)


def test_operator_checks_what_it_is_called_with():
    base = {
        "clips": torch.zeros(2, 3, 4, 5, 1),
        "indices": None,
        "num_frames": torch.tensor([3, 4]),
        "crop_start": None,
        "crop_padding": 0,
        "shear": None,
        "camera_scale": None,
        "camera_angles": None,
        "motion_scale": None,
        "bone_parents": [2, 0, 2, 0, 2],
        "previous_bones": [2, 0, 2, 0, 2],
        "chest_normal": [4, 1, 3],
        "modalities": [0],
        "num_views": 1,
        "dtype": torch.float32,
        "statistics": True,
    }
    assert torch.ops.ikem_fast.clip_views(**base)[0].shape == (1, 1, 2, 4, 5, 3)
    for changes, error, message in (
        ({"clips": torch.zeros(2, 3, 4, 5)}, ValueError, r"clips must be \(N, 3, T, V, M\)"),
        ({"clips": torch.zeros(2, 3, 4, 1, 5).mT}, ValueError, None),
        ({"clips": torch.zeros(2, 3, 8, 5, 1)[:, :, ::2]}, ValueError, "clips must be contiguous within each clip"),
        ({"num_frames": torch.tensor([3, 0])}, ValueError, "num_frames must be above 0, got 0 for clip 1"),
        ({"indices": torch.tensor([0, 2])}, IndexError, r"indices must be 0 \.\.\. 1, got 2 in place 1"),
        ({"crop_start": torch.tensor([[0, 1]])}, ValueError, r"crop_start must be 0 \.\.\. 0, got 1"),
        ({"crop_padding": 5}, ValueError, r"crop_padding must be 0 \.\.\. 4, got 5"),
        ({"shear": torch.zeros(1, 2, 6)}, ValueError, r"shear must be \[1, 2, 2, 3\] Float, got \[1, 2, 6\]"),
        (
            {"motion_scale": torch.zeros(1, 2).double()},
            ValueError,
            r"motion_scale must be \[1, 2\] Float, got .* Double",
        ),
        ({"num_views": 0}, ValueError, "num_views must be above 0, got 0"),
        ({"dtype": torch.float64}, ValueError, "dtype must be float64 for float64 clips"),
        ({"bone_parents": [0, 1, 2, 0, 2]}, ValueError, "exactly one root"),
        ({"modalities": [6]}, ValueError, r"modalities must hold numbers 0 \.\.\. 5, got 6"),
    ):
        if message is None:  # sizes of one may have any stride
            assert torch.ops.ikem_fast.clip_views(**{**base, **changes})[0].shape == (1, 1, 2, 4, 5, 3)
            continue
        with pytest.raises(error, match=message):
            torch.ops.ikem_fast.clip_views(**{**base, **changes})


def test_gradient_mode_off_accepts_clips_that_require_one():
    clips, num_frames = GOOD[0].clone().requires_grad_(), GOOD[1]
    with torch.no_grad():
        views = clip_views(clips, num_frames).views
    assert torch.equal(views, clip_views(*GOOD).views)


def test_without_the_compiled_part_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_problem", "ikem_fast's compiled part is missing: build it")
    with pytest.raises(_extension.ExtensionError, match="compiled part is missing"):
        clip_views(*GOOD)
    assert clip_views_reference(*GOOD).views.shape == (1, 6, 4, 6, 25, 3)


@pytest.mark.cuda
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["ntu-rgb+d", "nw-ucla"])
def test_cuda_agrees_with_definition(stored, layout):
    clips, num_frames = make_set(num_clips=9, num_joints=layouts.get(layout).num_joints, dtype=stored)
    indices = torch.tensor([8, 0, 3, 3, 7])
    for config in (EVERYTHING, AugmentationConfig()):
        drawn = draw(clips, indices, config)
        on_device = draw_views(1, 0, indices.cuda(), 50, config)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ours = clip_views(clips.cuda(), num_frames.cuda(), indices.cuda(), on_device, layout, dtype=dtype)
            expected = clip_views_reference(clips, num_frames, indices, drawn, layout, dtype=dtype)
            ours = ours._replace(views=ours.views.cpu(), statistics=ours.statistics.cpu())
            assert_agree(ours, expected, 4 * TOLERANCE[dtype], axis_tolerance=max(4 * TOLERANCE[dtype], 1e-3))
            assert torch.allclose(ours.statistics, summed(ours.views), rtol=1e-5, atol=1e-3)


@pytest.mark.cuda
def test_cuda_gives_nan_for_an_index_outside_the_set():
    clips, num_frames = make_set(num_clips=2)
    views = clip_views(clips.cuda(), num_frames.cuda(), torch.tensor([1, 2]).cuda(), modalities=["joint"]).views
    assert views[0, 0, :2].isfinite().all()
    assert views[0, 0, 2:].isnan().all()
