"""Modalities: the compiled operator, its plain definition, and the vectors of the authors' release."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import ikem_fast
from ikem_fast import _extension, layouts, modalities
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops import derive_modalities, derive_modalities_reference

VECTORS = Path(__file__).parent / "golden" / "modalities.npz"
OP = importlib.import_module("ikem_fast.ops.derive_modalities")
# The tolerance is relative to the largest magnitude of a modality, so that small ones count as much as large ones.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
CUSTOM_LAYOUT = """
name: kite
joints: [tip, left, middle, right, tail]
bones: {tip: middle, left: tip, right: tip, tail: middle}
center: middle
chest_normal: [tail, left, right]
previous_bones: {right: left}
"""


at_odd_sizes = pytest.mark.parametrize(
    ("num_clips", "num_frames", "num_persons"),
    [(0, 5, 2), (1, 1, 1), (2, 2, 1), (1, 3, 2), (5, 11, 3), (1, 64, 5), (37, 21, 2), (1, 2, 40)],
)


def make_clips(num_clips=3, num_frames=7, num_joints=25, num_persons=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(num_clips, 3, num_frames, num_joints, num_persons, generator=generator, dtype=torch.float64)
    return clips.to(dtype), torch.randint(10, 300, (num_clips,), generator=generator)


def relative_error(actual, expected):
    """The largest difference of each modality over its largest magnitude; infinite where shapes or NaNs differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    worst = 0.0
    for ours, wanted in zip(actual, expected, strict=True):
        if not torch.equal(ours.isnan(), wanted.isnan()):
            return float("inf")
        difference = (ours - wanted).nan_to_num().abs()
        scale = wanted.nan_to_num().abs().amax().clamp_min(1e-30) if wanted.numel() else 1.0
        worst = max(worst, float((difference / scale).amax()) if wanted.numel() else 0.0)
    return worst


@pytest.fixture
def kite(tmp_path):
    path = tmp_path / "kite.yaml"
    path.write_text(CUSTOM_LAYOUT)
    return path


@pytest.mark.parametrize("function", [derive_modalities, derive_modalities_reference])
@pytest.mark.parametrize("name", MODALITIES)
def test_agrees_with_reference_vectors(function, name):
    vectors = np.load(VECTORS)
    ours = function(torch.from_numpy(vectors["input"]), torch.from_numpy(vectors["num_frames"]), modalities=[name])
    error = np.abs(ours[0].numpy() - vectors[name]).max() / np.abs(vectors[name]).max()
    assert error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["ntu-rgb+d", "nw-ucla", "utd-mhad", "kite"])
def test_operator_agrees_with_definition(dtype, layout, kite):
    layout = kite if layout == "kite" else layout
    clips, num_frames = make_clips(num_joints=layouts.get(layout).num_joints, dtype=dtype)
    ours = derive_modalities(clips, num_frames, layout)
    assert ours.is_contiguous()
    assert relative_error(ours, derive_modalities_reference(clips, num_frames, layout)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_agrees(capability, dtype):
    clips, num_frames = make_clips(num_frames=50, dtype=dtype)
    ours = derive_modalities(clips, num_frames)
    assert relative_error(ours, derive_modalities_reference(clips, num_frames)) < TOLERANCE[dtype]


@at_odd_sizes
@pytest.mark.parametrize("layout", ["ntu-rgb+d", "nw-ucla"])
def test_odd_sizes(num_clips, num_frames, num_persons, layout):
    num_joints = layouts.get(layout).num_joints
    for dtype in (torch.float32, torch.float64):
        clips, counts = make_clips(num_clips, num_frames, num_joints, num_persons, dtype)
        ours = derive_modalities(clips, counts, layout)
        assert ours.shape == (6, *clips.shape)
        assert relative_error(ours, derive_modalities_reference(clips, counts, layout)) < TOLERANCE[dtype]


def test_last_frames_are_zero_and_one_frame_is_enough():
    clips, counts = make_clips(num_frames=6)
    motion, acceleration, velocity = derive_modalities(
        clips, counts, modalities=("motion", "acceleration", "angular_velocity")
    )
    assert motion[:, :, -1].eq(0).all()
    assert motion[:, :, :-1].ne(0).all()
    assert acceleration[:, :, -2:].eq(0).all()
    assert acceleration[:, :, :-2].ne(0).all()
    assert velocity[:, :, -1].eq(0).all()
    one = derive_modalities(clips[:, :, :1], counts)
    assert one[[1, 3, 5]].eq(0).all()
    assert torch.equal(one[0], clips[:, :, :1])


def test_chest_normal_is_perpendicular_to_the_chest_and_can_be_left_out():
    clips, counts = make_clips(dtype=torch.float64)
    layout = layouts.get("ntu-rgb+d")
    with_normal = derive_modalities(clips, counts, layout, ["bone"])[0]
    normal = with_normal[:, :, :, layout.root]
    a, b, c = (with_normal[:, :, :, joint] for joint in layout.chest_normal)
    for side in (a - c, b - c):
        assert (normal * side).sum(dim=1).abs().max() < 1e-12
    assert torch.allclose(normal.norm(dim=1), torch.ones(()).double())
    assert ((a - c).cross(b - c, dim=1) * normal).sum(dim=1).min() > 0

    without = derive_modalities(clips, counts, layout, chest_normal=False)
    reference = derive_modalities_reference(clips, counts, layout, chest_normal=False)
    assert relative_error(without, reference) < TOLERANCE[torch.float64]
    assert without[2, :, :, :, layout.root].eq(0).all()
    others = [joint for joint in range(25) if joint != layout.root]
    assert torch.equal(without[2][:, :, :, others], with_normal[:, :, :, others])


@pytest.mark.parametrize(
    "names", [("angular_velocity",), ("bone", "joint"), ("rotation_axis", "motion", "acceleration"), MODALITIES[::-1]]
)
def test_any_subset_in_any_order(names):
    clips, counts = make_clips()
    everything = dict(zip(MODALITIES, derive_modalities(clips, counts), strict=True))
    subset = derive_modalities(clips, counts, modalities=names)
    assert torch.equal(subset, torch.stack([everything[name] for name in names]))


def test_accepts_strided_clips_and_narrow_counts():
    clips, counts = make_clips(num_clips=4, num_frames=9)
    expected = derive_modalities(clips[::2, :, 1::2, :, :1].clone(), counts[::2])
    strided = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)[::2, :, 1::2, :, :1]
    assert not strided.is_contiguous()
    assert torch.equal(derive_modalities(strided, counts.to(torch.int16)[::2]), expected)


def test_nan_stays_with_its_person_and_joint():
    clips, counts = make_clips()
    expected = derive_modalities(clips, counts)
    broken = clips.clone()
    broken[..., 1] = float("nan")
    assert torch.equal(derive_modalities(broken, counts)[..., 0], expected[..., 0])

    broken = clips.clone()
    hand = layouts.get("ntu-rgb+d").joint_names.index("hand_tip_left")
    broken[0, 1, 3, hand, 0] = float("nan")
    ours = derive_modalities(broken, counts)
    assert relative_error(ours, derive_modalities_reference(broken, counts)) < TOLERANCE[torch.float32]
    touched = ours.isnan().any(dim=(0, 1, 2))
    thumb = layouts.get("ntu-rgb+d").joint_names.index("thumb_left")
    assert {tuple(place) for place in touched.nonzero().tolist()} == {
        (frame, joint, 0) for frame in (1, 2, 3) for joint in (hand, thumb) if frame > 1 or joint == hand
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_bones_give_zeros(dtype):
    clips, counts = make_clips(dtype=dtype)
    names = layouts.get("ntu-rgb+d").joint_names
    elbow, wrist, hand = (names.index(f"{part}_left") for part in ("elbow", "wrist", "hand"))
    clips[0, :, :, wrist] = clips[0, :, :, elbow]  # a bone of length zero
    clips[1, :, :, elbow] = 0.5
    clips[1, :, :, wrist] = 1.5
    clips[1, :, :, hand] = 2.5  # two bones in line, with all coordinates exact
    clips[2] = 0
    for function in (derive_modalities, derive_modalities_reference):
        axis, velocity = function(clips, counts, modalities=("rotation_axis", "angular_velocity"))
        for row in (axis, velocity):
            assert row[0, :, :, wrist].eq(0).all()
            assert row[1, :, :, hand].eq(0).all()
            assert row[2].eq(0).all()
            assert row.isfinite().all()


def test_angular_velocity_of_nearly_parallel_bones_is_bounded():
    """The angle keeps full accuracy everywhere; only the axis loses digits, by 1 / sin(theta)."""
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
    clips, counts = make_clips(num_clips=64, num_frames=10, num_joints=5, num_persons=1)
    sizes = 10.0 ** -torch.randint(1, 8, (64, 1, 10, 1), generator=generator).float()
    bend = torch.randn(64, 3, 10, 1, generator=generator) * sizes
    direction = torch.where(torch.arange(64).view(-1, 1, 1, 1) % 2 == 0, 1.0, -1.0)  # near 0 and near pi
    clips[:, :, :, 0] = 0
    clips[:, :, :, 2] = clips[:, :, :, 1] + direction * (clips[:, :, :, 1] + bend)

    ours = derive_modalities(clips, counts, layout, ["angular_velocity"])[0][:, :, :-1, 2].double()
    definition = derive_modalities_reference(clips, counts, layout, ["angular_velocity"])[0][:, :, :-1, 2].double()
    exact = derive_modalities_reference(clips.double(), counts, layout, ["angular_velocity"])[0][:, :, :-1, 2]
    base, middle, end = clips.double()[:, :, :, :3].unbind(3)
    first, second = middle - base, end - middle
    sine = second.cross(first, dim=1).norm(dim=1) / (first.norm(dim=1) * second.norm(dim=1))
    epsilon = torch.finfo(torch.float32).eps
    rate = (50 / counts.double()).view(-1, 1, 1, 1)
    # Same coordinates, same axis: the operator and the definition differ by the rounding of angles.
    assert ((ours - definition).abs() / rate).max() < 16 * epsilon
    allowed = 16 * epsilon + exact.norm(dim=1, keepdim=True) / rate * (4 * epsilon / sine[:, None, :-1]).clamp_max(2)
    assert ((ours - exact).abs() / rate / allowed).max() < 1
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("name", MODALITIES)
def test_gradient_is_that_of_the_definition(name):
    clips, counts = make_clips(num_clips=1, num_frames=3, num_joints=20, num_persons=1, dtype=torch.float64)
    clips.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: derive_modalities(x, counts, "nw-ucla", [name]), clips, fast_mode=True)


def gradient_of(function, clips, counts, layout, names=MODALITIES, *, weights, **settings):
    clips = clips.detach().requires_grad_()
    derived = function(clips, counts, layout, names, **settings)
    return torch.autograd.grad(derived, clips, weights.to(derived))[0]


def check_gradient(clips, counts, layout, names=MODALITIES, **settings):
    """Against the definition's in float64 for the same coordinates: within rounding in float64; in float32, where
    rounding turns axes of nearly parallel bones, not much worse than the definition in float32."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(len(names), *clips.shape, generator=generator, dtype=torch.float64)
    settings["weights"] = weights
    ours = gradient_of(derive_modalities, clips, counts, layout, names, **settings)
    assert ours.shape == clips.shape
    assert ours.dtype == clips.dtype
    if not clips.numel():
        return
    exact = gradient_of(derive_modalities_reference, clips.double(), counts, layout, names, **settings)
    scale = exact.abs().max()
    allowed = 1e-12 * scale
    if clips.dtype == torch.float32:
        definition = gradient_of(derive_modalities_reference, clips, counts, layout, names, **settings)
        allowed = 2e-6 * scale + 4 * (definition - exact).abs().max()
        assert allowed < 1e-2 * scale
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["ntu-rgb+d", "nw-ucla", "utd-mhad", "kite"])
def test_gradient_agrees_with_definition(dtype, layout, kite):
    layout = kite if layout == "kite" else layout
    clips, counts = make_clips(num_joints=layouts.get(layout).num_joints, num_frames=25, dtype=dtype)
    check_gradient(clips, counts, layout)
    check_gradient(clips, counts, layout, chest_normal=False)
    for name in MODALITIES:
        check_gradient(clips, counts, layout, [name])
    check_gradient(clips, counts, layout, ["rotation_axis", "motion"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_every_instruction_set_agrees(capability, dtype):
    clips, counts = make_clips(num_frames=50, dtype=dtype)
    check_gradient(clips, counts, "ntu-rgb+d")


@at_odd_sizes
def test_gradient_at_odd_sizes(num_clips, num_frames, num_persons):
    for layout, num_joints in (("ntu-rgb+d", 25), ("nw-ucla", 20)):
        for dtype in (torch.float32, torch.float64):
            check_gradient(*make_clips(num_clips, num_frames, num_joints, num_persons, dtype), layout)


def test_gradient_of_strided_clips_and_of_a_strided_gradient():
    clips, counts = make_clips(num_clips=4, num_frames=9, dtype=torch.float64)
    strided = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)[::2, :, 1::2, :, :1]
    check_gradient(strided, counts[::2], "ntu-rgb+d")
    inputs = [clips.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((derive_modalities, derive_modalities_reference), inputs, strict=True):
        function(leaf, counts).sum().backward()  # an expanded gradient
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-9)


def test_gradient_with_the_root_in_its_own_chest():
    # The root's difference, of which the chest normal is taken then, is zero whatever its coordinates are.
    clips, counts = make_clips(num_clips=2, num_frames=4, num_joints=5, num_persons=2, dtype=torch.float64)
    clips.requires_grad_()
    arguments = (counts, [2, 0, 2, 0, 2], [2, 0, 2, 0, 2], [4, 1, 2], [2, 4, 5])
    assert torch.autograd.gradcheck(lambda x: torch.ops.ikem_fast.derive_modalities(x, *arguments), clips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_where_bones_vanish(dtype):
    clips, counts = make_clips(dtype=dtype)
    clips[0] = 0
    clips[1, :, :2, 7] = clips[1, :, :2, 6]
    clips[2, :, :, 5:8] = clips[2, :, :, 4:5] * torch.tensor([2.0, 3.0, 4.0]).view(3, 1)
    weights = torch.randn(6, *clips.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, definition = (
        gradient_of(function, clips, counts, "ntu-rgb+d", weights=weights)
        for function in (derive_modalities, derive_modalities_reference)
    )
    assert ours.isfinite().all()
    assert ours.abs().max() < 1e5
    # In clip 2 rounding alone decides what the axes are.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-11
    assert (ours - definition)[:2].abs().max() < tolerance * definition[:2].abs().max()


def test_gradient_can_be_taken_once():
    clips, counts = make_clips(num_clips=1, num_frames=3)
    clips.requires_grad_()
    derived = (derive_modalities(clips, counts) ** 2).sum()
    (gradient,) = torch.autograd.grad(derived, clips, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_operator_is_registered_completely():
    clips, counts = make_clips(num_clips=2, num_frames=3, num_joints=5, num_persons=1)
    arguments = ([2, 0, 2, 0, 2], [2, 0, 2, 0, 2], [4, 1, 3], [0, 1, 2, 3, 4, 5])
    operator = torch.ops.ikem_fast.derive_modalities.default
    torch.library.opcheck(operator, (clips.requires_grad_(), counts, *arguments))
    meta = operator(clips.detach().to("meta"), counts.to("meta"), *arguments)
    assert meta.shape == (6, 2, 3, 3, 5, 1)
    backward = torch.ops.ikem_fast.derive_modalities_backward.default
    torch.library.opcheck(backward, (clips.detach(), counts, *arguments, torch.randn(6, *clips.shape)))


def test_compiles_without_a_graph_break():
    clips, counts = make_clips(num_clips=2, num_frames=4, num_joints=20, num_persons=1)
    clips.requires_grad_()

    def loss(x):
        return (derive_modalities(x, counts, "nw-ucla") ** 2).sum()

    expected = torch.autograd.grad(loss(clips), clips)[0]
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(clips), clips)[0]
    assert torch.allclose(compiled, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_registered_modality_is_derived_by_its_function(monkeypatch):
    monkeypatch.setattr(modalities, "_REGISTRY", dict(modalities._REGISTRY))
    modalities.register(
        "height",
        lambda clips, num_frames, layout, *, chest_normal=True: (
            clips * clips.new_tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1, 1)
        ),
    )
    clips, counts = make_clips()
    names = ("bone", "height", "joint")
    ours = derive_modalities(clips, counts, modalities=names)
    assert torch.equal(ours[1][:, 1], clips[:, 1])
    assert relative_error(ours, derive_modalities_reference(clips, counts, modalities=names)) < 2e-6
    assert torch.equal(derive_modalities(clips, counts, modalities=["height"])[0], ours[1])
    with pytest.raises(ValueError, match="modality 'bone' is registered already"):
        modalities.register("bone", modalities.get("joint"))


def test_names():
    assert ikem_fast.MODALITIES == MODALITIES == modalities.names()
    with pytest.raises(ValueError, match=r"got 'rotation-axis'; did you mean 'rotation_axis'\?"):
        modalities.get("rotation-axis")


GOOD = make_clips(num_clips=2, num_frames=4)


@pytest.mark.parametrize("function", [derive_modalities, derive_modalities_reference])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": GOOD[0].half()}, r"clips must be \(N, 3, T, V, M\) float32 or float64, got .* float16"),
        ({"clips": GOOD[0][0]}, r"clips must be \(N, 3, T, V, M\) .* got \(3, 4, 25, 2\) float32"),
        ({"clips": GOOD[0][:, :2]}, r"clips must be \(N, 3, T, V, M\) .* got \(2, 2, 4, 25, 2\)"),
        ({"clips": None}, r"clips must be .* got None"),
        ({"clips": GOOD[0][:, :, :0]}, r"clips must have at least one frame, joint and person, got \(2, 3, 0, 25, 2\)"),
        ({"clips": GOOD[0][..., :20, :]}, r"clips must have the 25 joints of layout 'ntu-rgb\+d', got \(2, 3, 4, 20"),
        ({"num_frames": GOOD[1][:1]}, r"num_frames must be \(2,\) integers, got \(1,\) int64"),
        ({"num_frames": GOOD[1].float()}, r"num_frames must be \(2,\) integers, got \(2,\) float32"),
        ({"num_frames": [30, 40]}, r"num_frames must be \(2,\) integers, got \[30, 40\]"),
        ({"num_frames": GOOD[1].to("meta")}, "num_frames must be on the clips' device cpu, got meta"),
        ({"num_frames": torch.tensor([5, 0])}, "num_frames must be above 0, got 0"),
        ({"layout": "ntu"}, "layout must be 'ntu-rgb"),
        ({"modalities": ["joint", "bones"]}, r"modality must be one of joint, .* got 'bones'; did you mean 'bone'\?"),
        ({"modalities": "joint"}, "modalities must be a non-empty sequence of names, got 'joint'"),
        ({"modalities": ()}, r"modalities must be a non-empty sequence of names, got \(\)"),
        ({"modalities": ("bone", "joint", "bone")}, "modalities must be distinct, got bone, joint, bone"),
    ],
)
def test_errors_name_the_argument(function, changes, message):
    arguments = {"clips": GOOD[0], "num_frames": GOOD[1], **changes}
    with pytest.raises(ValueError, match=message):
        function(**arguments)


OPERATOR_ARGUMENTS = {
    "clips": torch.zeros(2, 3, 4, 5, 1),
    "num_frames": torch.tensor([3, 4]),
    "bone_parents": [2, 0, 2, 0, 2],
    "previous_bones": [2, 0, 2, 0, 2],
    "chest_normal": [4, 1, 3],
    "modalities": [0],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": torch.zeros(2, 3, 4, 5)}, r"clips must be \(N, 3, T, V, M\) float32 or float64"),
        ({"num_frames": torch.tensor([3, 4], dtype=torch.int32)}, r"num_frames must be \(2,\) int64"),
        ({"num_frames": torch.tensor([3, -4])}, "num_frames must be above 0, got -4 for clip 1"),
        ({"bone_parents": [0, 0]}, "one joint for every one of the clips' 5, got 2 and 5"),
        ({"bone_parents": [5, 0, 2, 0, 2]}, r"bone_parents must hold joints 0 \.\.\. 4, got 5"),
        ({"previous_bones": [2, 0, -1, 0, 2]}, r"previous_bones must hold joints 0 \.\.\. 4, got -1"),
        ({"bone_parents": [0, 1, 2, 0, 2]}, "exactly one root, a joint that is its own parent, got 3"),
        ({"chest_normal": [1, 2]}, "chest_normal must name three joints or none, got 2"),
        ({"modalities": []}, "modalities must name at least one modality"),
        ({"modalities": [6]}, r"modalities must hold numbers 0 \.\.\. 5, got 6"),
        ({"modalities": [1, 1]}, "modalities must be distinct, got 1 twice"),
    ],
)
def test_operator_checks_what_it_is_called_with(changes, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.ikem_fast.derive_modalities(**{**OPERATOR_ARGUMENTS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": torch.zeros(1, 2, 3, 4, 5, 1)}, r"gradient must be \[2, 2, 3, 4, 5, 1\] Float on cpu, got \[1, "),
        ({"gradient": torch.zeros(2, 2, 3, 4, 5, 1).double()}, r"gradient must be .* Float on cpu, got .* Double"),
        ({"num_frames": torch.tensor([3, 0])}, "num_frames must be above 0, got 0 for clip 1"),
        ({"modalities": [1, 1]}, "modalities must be distinct, got 1 twice"),
    ],
)
def test_backward_checks_what_it_is_called_with(changes, message):
    arguments = {**OPERATOR_ARGUMENTS, "modalities": [0, 5], "gradient": torch.zeros(2, 2, 3, 4, 5, 1), **changes}
    with pytest.raises(ValueError, match=message):
        torch.ops.ikem_fast.derive_modalities_backward(**arguments)


def test_without_the_compiled_part_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_problem", "ikem_fast's compiled part is missing: build it")
    with pytest.raises(_extension.ExtensionError, match="compiled part is missing"):
        derive_modalities(*GOOD)
    assert derive_modalities_reference(*GOOD).shape == (6, 2, 3, 4, 25, 2)


def test_other_devices_use_the_definition(monkeypatch):
    monkeypatch.setattr(OP, "_has_kernel", lambda clips: False)
    assert torch.equal(derive_modalities(*GOOD), derive_modalities_reference(*GOOD))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["ntu-rgb+d", "nw-ucla"])
def test_cuda_agrees_with_definition(dtype, layout):
    clips, counts = make_clips(num_clips=5, num_frames=50, num_joints=layouts.get(layout).num_joints, dtype=dtype)
    for names in (MODALITIES, ("angular_velocity", "joint"), ("bone",)):
        ours = derive_modalities(clips.cuda(), counts.cuda(), layout, names)
        expected = derive_modalities_reference(clips, counts, layout, names)
        assert relative_error(ours.cpu(), expected) < 4 * TOLERANCE[dtype]


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["ntu-rgb+d", "nw-ucla"])
@pytest.mark.parametrize(("num_frames", "num_persons"), [(1, 1), (50, 2), (7, 12)])
def test_cuda_gradient_agrees_with_definition(layout, num_frames, num_persons):
    num_joints = layouts.get(layout).num_joints
    clips, counts = make_clips(3, num_frames, num_joints, num_persons, dtype=torch.float64)
    for names in (MODALITIES, ("angular_velocity", "joint"), ("bone",)):
        weights = torch.randn(len(names), *clips.shape, dtype=torch.float64)
        expected = gradient_of(derive_modalities_reference, clips, counts, layout, names, weights=weights)
        ours = gradient_of(derive_modalities, clips.cuda(), counts.cuda(), layout, names, weights=weights)
        assert (ours.cpu() - expected).abs().max() < 1e-11 * expected.abs().max()
        again = gradient_of(derive_modalities, clips.cuda(), counts.cuda(), layout, names, weights=weights)
        assert torch.equal(ours, again)
