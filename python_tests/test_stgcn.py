import copy

import pytest
import reference_vectors as vectors
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ikem_fast import layouts
from ikem_fast.nn import STGCN, EncoderInput, MultiStreamSTGCN, STGCNReference
from ikem_fast.nn.layers import BatchStatistics
from ikem_fast.nn.precision import activation_dtype, computes_bfloat16
from ikem_fast.reference import reference_encoder_name

KINDS = (STGCN, STGCNReference)


@pytest.fixture(scope="module")
def release():
    return vectors.load("stgcn.npz")


@pytest.fixture(params=KINDS)
def encoder(request, release):
    sizes = {"hidden_channels": 4, "feature_size": 16, "head_sizes": (16, 8), "dropout": 0.0}
    reference = STGCNReference(torch.tensor(release["state/A"]), **sizes)
    state = vectors.state_dict(release)
    own = reference.state_dict()
    assert {reference_encoder_name(name) for name in own} == set(state)
    reference.load_state_dict({name: state[reference_encoder_name(name)] for name in own})
    if request.param is STGCNReference:
        return reference
    encoder = STGCN(torch.tensor(release["state/A"]), **sizes)
    encoder.load_stream(0, reference.state_dict())
    return encoder


def tensors_of(encoder):
    return encoder.state_dict() if isinstance(encoder, STGCNReference) else encoder.stream_tensors(0)


def gradients_of(encoder, stream=0):
    """Under the names of a single encoder."""
    if isinstance(encoder, STGCNReference):
        return {name: parameter.grad for name, parameter in encoder.named_parameters()}
    gradients = copy.deepcopy(encoder)
    with torch.no_grad():
        for own, parameter in zip(gradients.parameters(), encoder.parameters(), strict=True):
            own.copy_(parameter.grad)
    names = {name for name, _ in encoder.to_reference(stream).named_parameters()}
    return {name: tensor for name, tensor in gradients.stream_tensors(stream).items() if name in names}


def small(kind=STGCN, **changes):
    arguments = {"hidden_channels": 2, "feature_size": 4, "head_sizes": (4, 3), "dropout": 0.0, **changes}
    layout = arguments.pop("layout", "nw-ucla")
    if kind is MultiStreamSTGCN:
        arguments = {"num_streams": 2, **arguments}
    return kind(layouts.get(layout).adjacency(), **arguments)


def test_release_outputs_gradients_and_running_statistics(release, encoder):
    clips = torch.tensor(release["input"])
    features = encoder.features(clips)
    output = encoder.head(features) if isinstance(encoder, STGCNReference) else encoder.head(features.unsqueeze(0))[0]
    # features() moved the running statistics once, as one training pass does.
    for name, tensor in tensors_of(encoder).items():
        expected = release.get(f"after/{reference_encoder_name(name)}")
        if expected is not None:
            torch.testing.assert_close(tensor, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert vectors.relative_error(features, release["features"]) < 1e-5
    assert vectors.relative_error(output, release["output"]) < 1e-5
    output.backward(torch.tensor(release["upstream"]))
    actual = {reference_encoder_name(name): gradient for name, gradient in gradients_of(encoder).items()}
    expected = {key.removeprefix("grad/"): a for key, a in release.items() if key.startswith("grad/")}
    assert set(actual) == set(expected)
    vectors.assert_gradients_agree(actual, expected, encoder_of=lambda name: "")


def test_published_size():
    encoder = STGCN(layouts.get("ntu-rgb+d").adjacency(), head_sizes=(256, 128))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(0.92e6, rel=0.02)
    channels = [block.temporal_conv.weight.shape[1] for block in encoder.blocks]
    assert channels == [16] * 4 + [32] * 3 + [64] * 2 + [256]
    assert [block.dropout for block in encoder.blocks] == [0.0] + [0.5] * 9
    reference = encoder.to_reference(0)
    assert [block.temporal_conv.out_channels for block in reference.blocks] == channels
    assert [block.dropout.p for block in reference.blocks] == [0.0] + [0.5] * 9


@pytest.mark.parametrize("kind", [MultiStreamSTGCN, STGCNReference])
def test_initialisation(kind):
    torch.manual_seed(0)
    encoder = small(kind, layout="ntu-rgb+d", hidden_channels=16, feature_size=256, head_sizes=(256, 128))
    layers = [layer for layer in encoder.modules() if getattr(layer, "weight", None) is not None]
    assert len(layers) == 1 + 4 * 10 + 2 * 3 + 2
    for layer in layers:
        norm = layer.weight.dim() == (2 if kind is MultiStreamSTGCN else 1)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2 if layer.weight.numel() > 200 else 0.5)
        assert layer.weight.mean().item() == pytest.approx(1.0 if norm else 0.0, abs=0.02)
        assert not layer.bias.any()
    if kind is MultiStreamSTGCN:
        assert not torch.equal(encoder.head[0].weight[0], encoder.head[0].weight[1])
    assert all((block.importance == 1).all() for block in encoder.blocks)


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
    zeros = encoder.graph.adjacency == 0
    assert not encoder.blocks[3].importance.grad[0, zeros].any()
    assert encoder.blocks[3].importance.grad[0, ~zeros].any()


def moments(x):
    """The input with its mean and variance, as the op that makes the views hands them on."""
    variance, mean = torch.var_mean(x.values.double(), dim=(0, 1), correction=0)
    return x._replace(mean=mean, variance=variance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_persons", [1, 2])
def test_known_statistics_change_nothing(num_persons, kind):
    torch.manual_seed(0)
    known, unknown = (small(kind).double() for _ in range(2))
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
    x = EncoderInput.of_clips(torch.full((4, 3, 9, 20, 1), 3.3))
    norm = small(STGCNReference).input_norm
    torch.nn.init.normal_(norm.bias)
    assert torch.equal(norm(moments(x)), norm.bias.detach().view(20, 3).expand(4, 9, 20, 3))
    stacked = small().input_norm
    torch.nn.init.normal_(stacked.bias)
    several = EncoderInput(
        *(value if name == "num_persons" else value.unsqueeze(0) for name, value in moments(x)._asdict().items())
    )
    expected = stacked.bias.detach().view(1, 1, 1, 20, 3).expand(1, 4, 9, 20, 3)
    assert torch.equal(stacked(several, BatchStatistics()), expected)


def test_evaluation_uses_running_statistics_whatever_is_known():
    encoder = small().eval()
    before = copy.deepcopy(encoder.state_dict())
    x = EncoderInput.of_clips(torch.randn(4, 3, 9, 20, 2))
    assert torch.equal(encoder(moments(x)), encoder(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


# ---- several streams


def separate(num_streams, *, layout="nw-ucla", **changes):
    """Single encoders in plain PyTorch that differ, in float64."""
    torch.manual_seed(0)
    singles = [small(STGCNReference, layout=layout, **changes).double() for _ in range(num_streams)]
    with torch.no_grad():
        for single in singles:
            for name, tensor in single.named_parameters():
                tensor.add_(0.3 * torch.randn_like(tensor) if "importance" in name or tensor.dim() == 1 else 0)
    return singles


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize(
    ("num_streams", "layout", "num_clips", "num_frames", "num_persons"),
    [(6, "nw-ucla", 3, 13, 2), (1, "ntu-rgb+d", 4, 9, 1), (2, "utd-mhad", 5, 22, 3), (3, "ntu-rgb+d", 2, 50, 2)],
)
def test_streams_behave_as_encoders_alone(num_streams, layout, num_clips, num_frames, num_persons, precise):
    dtype = torch.float64 if precise else torch.float32
    singles = separate(num_streams, layout=layout, hidden_channels=3, feature_size=10, head_sizes=(6, 5))
    stacked = MultiStreamSTGCN.stack(singles).to(dtype)
    num_joints = singles[0].adjacency.shape[-1]
    for _ in range(2):
        clips = torch.randn(num_streams, num_clips, 3, num_frames, num_joints, num_persons, dtype=torch.float64)
        output = stacked(clips.to(dtype))
        expected = torch.stack([single(x) for single, x in zip(singles, clips, strict=True)])
        upstream = torch.randn_like(expected)
        tolerance = {"rtol": 1e-6, "atol": 1e-12} if precise else {"rtol": 2e-4, "atol": 2e-6}
        torch.testing.assert_close(output.double(), expected, **tolerance)
        output.backward(upstream.to(dtype))
        expected.backward(upstream)
    for stream, single in enumerate(singles):
        for name, tensor in stacked.stream_tensors(stream).items():
            torch.testing.assert_close(tensor, single.state_dict()[name].to(tensor.dtype), rtol=1e-4, atol=1e-6)
        expected = gradients_of(single)
        largest = max(gradient.norm().item() for gradient in expected.values())
        for name, gradient in gradients_of(stacked, stream).items():
            difference = (gradient.double() - expected[name]).norm().item()
            accepted = 1e-8 if precise else 1e-3
            assert difference <= accepted * (expected[name].norm().item() + 0.1 * largest), name
    stacked.eval()
    for single in singles:
        single.eval()
    expected = torch.stack([single(x) for single, x in zip(singles, clips, strict=True)]).detach()
    tolerance = {"rtol": 1e-6, "atol": 1e-12} if precise else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(stacked(clips.to(dtype)).double(), expected, **tolerance)
    with torch.no_grad():  # norms folded into the products
        torch.testing.assert_close(stacked(clips.to(dtype)).double(), expected, **tolerance)


def test_encoders_are_stacked_and_taken_apart_without_loss():
    singles = separate(3, dropout=0.25)
    stacked = MultiStreamSTGCN.stack(singles).float()
    assert (stacked.dropout, stacked.num_streams, stacked.head_sizes) == (0.25, 3, (4, 3))
    again = MultiStreamSTGCN.stack(stacked.unstack())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in stacked.state_dict().items())
    for stream, single in enumerate(singles):
        for name, tensor in stacked.to_reference(stream).state_dict().items():
            assert torch.equal(tensor, single.state_dict()[name].to(tensor.dtype)), name
    other = small(STGCNReference, layout="ntu-rgb+d")
    with pytest.raises(ValueError, match=r"state must hold a stream's tensors, got other adjacency"):
        stacked.load_stream(0, other.state_dict())
    state = singles[0].state_dict()
    with pytest.raises(ValueError, match="got another adjacency"):
        stacked.load_stream(0, {**state, "adjacency": 2 * state["adjacency"]})
    with pytest.raises(ValueError, match="encoders must hold at least one, got none"):
        MultiStreamSTGCN.stack([])


def test_some_streams_alone():
    encoders = small(MultiStreamSTGCN, num_streams=4).eval()
    clips = torch.randn(4, 3, 3, 11, 20, 1)
    for streams in ([2], [3, 0], [0, 1, 2, 3]):
        torch.testing.assert_close(encoders.of_streams(clips[streams], streams), encoders(clips)[streams])


def test_a_graph_that_is_loaded_replaces_the_edges():
    graph = layouts.get("ntu-rgb+d")
    one, other = (STGCN(graph.adjacency(limit), hidden_channels=2, feature_size=4).eval() for limit in (1, None))
    clips = torch.randn(2, 3, 9, 25, 1)
    assert not torch.equal(one.features(clips), other.features(clips))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.features(clips), other.features(clips))


def test_dropout_differs_between_streams_and_passes_and_follows_the_seed():
    encoders = small(MultiStreamSTGCN, num_streams=2, dropout=0.5, hidden_channels=4)
    with torch.no_grad():
        for parameter in encoders.parameters():
            parameter[1] = parameter[0]
    clips = torch.randn(1, 4, 3, 17, 20, 2).expand(2, -1, -1, -1, -1, -1)
    torch.manual_seed(3)
    first, second = encoders.features(clips), encoders.features(clips)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(encoders.features(clips), first)
    alike = small(MultiStreamSTGCN, num_streams=2, dropout=0.5, hidden_channels=4)
    alike.load_stream(1, alike.stream_tensors(0))
    random_state = torch.get_rng_state()
    assert torch.equal(*alike.eval().features(clips))
    assert torch.equal(torch.get_rng_state(), random_state)


def relative_difference(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def test_bfloat16_is_no_further_from_float32_than_autocast():
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "feature_size": 64, "head_sizes": (16,)}
    exact = small(STGCNReference, layout="ntu-rgb+d", **sizes)
    clips, upstream = torch.randn(12, 3, 20, 25, 2), torch.randn(12, 16)

    def run(encoder, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = encoder(clips)
        output.float().backward(upstream)
        return {"output": output.detach(), **gradients_of(encoder)}

    expected, eager = run(copy.deepcopy(exact)), run(copy.deepcopy(exact), autocast=True)
    rounded = MultiStreamSTGCN.stack([exact], precision="bf16").unstack()[0]
    ours = run(rounded)
    assert rounded.features(clips).dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in rounded.parameters())
    for name in ("output", "blocks.9.temporal_conv.weight", "blocks.5.graph_conv.weight", "blocks.0.importance"):
        error, of_eager = (relative_difference(values[name], expected[name]) for values in (ours, eager))
        assert 0 < error < 2 * of_eager, name
    with torch.no_grad():
        expected, folded = rounded.eval().to_reference(0)(clips), rounded(clips)
    assert relative_difference(folded, expected) < 0.03


def test_automatic_precision_follows_the_device():
    weight = torch.zeros(1)
    expected = torch.bfloat16 if computes_bfloat16(weight.device) else torch.float32
    assert activation_dtype("auto", weight) is expected
    assert activation_dtype("bf16", weight.double()) is torch.float64
    assert activation_dtype("fp32", weight) is torch.float32


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_nothing_of_three_times_the_channels_is_made():
    encoders = small(MultiStreamSTGCN, layout="ntu-rgb+d", hidden_channels=16, feature_size=32)
    clips = torch.randn(2, 2, 3, 50, 25, 2)
    activations = 2 * 4 * 50 * 25 * 32  # of block 5 before its stride
    with Sizes() as sizes:
        encoders.features(clips).sum().backward()
    assert sizes.largest == activations
    reference = encoders.to_reference(0)
    with Sizes() as sizes:
        reference.features(clips[0]).sum().backward()
    assert sizes.largest == 3 * activations // 2


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"x must be \(N·M, T, 20, 3\), got \(4, 9, 20, 2\) float32"):
        small()(EncoderInput(torch.zeros(4, 9, 20, 2), 1))
    with pytest.raises(ValueError, match=r"x must be \(2, N, 3, T, 20, M\), got \(3, 1, 3, 9, 20, 1\) float32"):
        small(MultiStreamSTGCN)(torch.zeros(3, 1, 3, 9, 20, 1))
    with pytest.raises(ValueError, match=r"x must be \(2, N·M, T, 20, 3\), got \(2, 4, 9, 25, 3\) float32"):
        small(MultiStreamSTGCN)(EncoderInput(torch.zeros(2, 4, 9, 25, 3), 1))
    with pytest.raises(ValueError, match="num_streams must be at least 1, got 0"):
        small(MultiStreamSTGCN, num_streams=0)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, auto, got 'fp16'"):
        small(precision="fp16")
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
