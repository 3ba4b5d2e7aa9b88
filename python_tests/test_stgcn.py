import copy

import pytest
import reference_vectors as vectors
import torch

from ikem_fast import layouts
from ikem_fast.nn import STGCN, EncoderInput
from ikem_fast.reference import reference_encoder_name


@pytest.fixture(scope="module")
def release():
    return vectors.load("stgcn.npz")


@pytest.fixture
def encoder(release):
    encoder = STGCN(
        torch.tensor(release["state/A"]), hidden_channels=4, feature_size=16, head_sizes=(16, 8), dropout=0.0
    )
    state = vectors.state_dict(release)
    own = encoder.state_dict()
    assert {reference_encoder_name(name) for name in own} == set(state)
    encoder.load_state_dict({name: state[reference_encoder_name(name)] for name in own})
    return encoder


def small(**changes):
    arguments = {"hidden_channels": 2, "feature_size": 4, "head_sizes": (4, 3), "dropout": 0.0, **changes}
    return STGCN(layouts.get("nw-ucla").adjacency(), **arguments)


def test_release_outputs_gradients_and_running_statistics(release, encoder):
    clips = torch.tensor(release["input"])
    features = encoder.features(clips)
    output = encoder.head(features)
    # features() moved the running statistics once, as one training pass does.
    for name, tensor in encoder.named_buffers():
        expected = release.get(f"after/{reference_encoder_name(name)}")
        if expected is not None:
            torch.testing.assert_close(tensor, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert vectors.relative_error(features, release["features"]) < 1e-5
    assert vectors.relative_error(output, release["output"]) < 1e-5
    output.backward(torch.tensor(release["upstream"]))
    actual = {reference_encoder_name(name): p.grad for name, p in encoder.named_parameters()}
    expected = {key.removeprefix("grad/"): a for key, a in release.items() if key.startswith("grad/")}
    assert set(actual) == set(expected)
    vectors.assert_gradients_agree(actual, expected, encoder_of=lambda name: "")


def test_forward_is_head_of_features(release, encoder):
    encoder.eval()
    clips = torch.tensor(release["input"])
    torch.testing.assert_close(encoder(clips), encoder.head(encoder.features(clips)))


def test_published_size():
    encoder = STGCN(layouts.get("ntu-rgb+d").adjacency(), head_sizes=(256, 128))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(0.92e6, rel=0.02)
    assert [block.temporal_conv.out_channels for block in encoder.blocks] == [16] * 4 + [32] * 3 + [64] * 2 + [256]
    assert [block.dropout.p for block in encoder.blocks] == [0.0] + [0.5] * 9


def test_initialisation():
    torch.manual_seed(0)
    encoder = STGCN(layouts.get("ntu-rgb+d").adjacency(), head_sizes=(256, 128))
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert abs(layer.weight.mean().item()) < 0.006
            assert not layer.bias.any()
        elif isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert not layer.bias.any()


@pytest.mark.parametrize(("num_clips", "num_frames", "num_persons"), [(1, 1, 1), (2, 7, 3), (3, 50, 1)])
def test_any_length_and_number_of_persons(num_clips, num_frames, num_persons):
    encoder = small().eval()
    clips = torch.randn(num_clips, 3, num_frames, 20, num_persons)
    assert encoder(clips).shape == (num_clips, 3)
    swapped = clips.flip(4)
    torch.testing.assert_close(encoder(swapped), encoder(clips))


def test_a_joint_without_edge_in_the_graph_does_not_matter_to_importance():
    encoder = small()
    encoder(torch.randn(2, 3, 9, 20, 1)).sum().backward()
    zeros = encoder.adjacency == 0
    assert not encoder.blocks[3].importance.grad[zeros].any()


def moments(x):
    """The input with its mean and variance, as the op that makes the views hands them on."""
    variance, mean = torch.var_mean(x.values.double(), dim=(0, 1), correction=0)
    return x._replace(mean=mean, variance=variance)


@pytest.mark.parametrize("num_persons", [1, 2])
def test_known_statistics_change_nothing(num_persons):
    torch.manual_seed(0)
    known, unknown = (small().double() for _ in range(2))
    known.load_state_dict(unknown.state_dict())
    for _ in range(2):
        clips = 3.0 + 0.1 * torch.randn(4, 3, 9, 20, num_persons, dtype=torch.float64)
        outputs = known(moments(EncoderInput.of_clips(clips))), unknown(clips)
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-15)
        for output in outputs:
            output.square().sum().backward()
    for (name, one), other in zip(known.named_parameters(), unknown.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-15, msg=name)
    for (name, one), other in zip(known.named_buffers(), unknown.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(known.eval()(clips), unknown.eval()(clips))


def test_the_input_norm_leaves_nothing_but_the_bias_of_a_joint_that_never_moves():
    norm = small().input_norm
    x = EncoderInput.of_clips(torch.full((4, 3, 9, 20, 1), 3.3))
    torch.nn.init.normal_(norm.bias)
    assert torch.equal(norm(moments(x)), norm.bias.detach().view(20, 3).expand(4, 9, 20, 3))


def test_evaluation_uses_running_statistics_whatever_is_known():
    encoder = small().eval()
    before = copy.deepcopy(encoder.state_dict())
    x = EncoderInput.of_clips(torch.randn(4, 3, 9, 20, 2))
    assert torch.equal(encoder(moments(x)), encoder(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"x must be \(N·M, T, 20, 3\), got \(4, 9, 20, 2\) float32"):
        small()(EncoderInput(torch.zeros(4, 9, 20, 2), 1))
    with pytest.raises(ValueError, match="num_persons must divide the 4 sequences of x, got 3"):
        small()(EncoderInput(torch.zeros(4, 9, 20, 3), 3))
    with pytest.raises(ValueError, match=r"x must be \(N, 3, T, 20, M\), got \(2, 3, 9, 25, 1\) float32"):
        small()(torch.randn(2, 3, 9, 25, 1))
    with pytest.raises(ValueError, match=r"adjacency must be \(3, V, V\) float32, got \(2, 20, 20\)"):
        STGCN(torch.zeros(2, 20, 20))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        small(dropout=1.0)
    with pytest.raises(ValueError, match="hidden_channels must be at least 1, got 0"):
        small(hidden_channels=0)
