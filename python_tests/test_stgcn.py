import pytest
import reference_vectors as vectors
import torch

from ikem_fast import layouts
from ikem_fast.nn import STGCN
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


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"x must be \(N, 3, T, 20, M\), got \(2, 3, 9, 25, 1\) float32"):
        small()(torch.randn(2, 3, 9, 25, 1))
    with pytest.raises(ValueError, match=r"adjacency must be \(3, V, V\) float32, got \(2, 20, 20\)"):
        STGCN(torch.zeros(2, 20, 20))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        small(dropout=1.0)
    with pytest.raises(ValueError, match="hidden_channels must be at least 1, got 0"):
        small(hidden_channels=0)
