"""The spatio-temporal graph convolutional encoder (ST-GCN) of several streams at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ikem_fast import ops
from ikem_fast.nn.layers import (
    BatchStatistics,
    GraphConvolution,
    InputNorm,
    StackedBatchNorm,
    TemporalConvolution,
    stacked_head,
)
from ikem_fast.nn.parts import (
    NUM_PARTITIONS,
    TEMPORAL_KERNEL,
    EncoderInput,
    block_plan,
    check_sizes,
    initialize_weights,
)
from ikem_fast.nn.precision import activation_dtype, check_precision
from ikem_fast.nn.stgcn_reference import STGCNReference
from ikem_fast.ops._checks import describe


class Graph(nn.Module):
    """An adjacency and what the graph convolution needs to know of it; follows the encoder to its device."""

    adjacency: Tensor
    edges: Tensor
    identity: Tensor
    identity_edges: Tensor

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        num_joints = adjacency.shape[-1]
        self.register_buffer("adjacency", adjacency.clone())
        self.register_buffer("identity", torch.eye(num_joints).unsqueeze(0), persistent=False)
        self.register_buffer("edges", ops.graph_edges(self.adjacency), persistent=False)
        self.register_buffer("identity_edges", ops.graph_edges(self.identity), persistent=False)
        self.register_load_state_dict_post_hook(lambda graph, _: graph._find_edges())

    def _find_edges(self) -> None:
        self.edges = ops.graph_edges(self.adjacency)


class Block(nn.Module):
    """Graph convolution, BN, ReLU, 9x1 convolution, BN, dropout, + residual, ReLU (docs/method.md section 4).

    Three passes over its values: each operation also makes the batch statistics of its result, and the next one applies
    the norm as it loads.
    """

    def __init__(
        self,
        num_streams: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        dropout: float,
        num_joints: int,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.importance = nn.Parameter(torch.ones(num_streams, NUM_PARTITIONS, num_joints, num_joints))
        self.graph_conv = GraphConvolution(num_streams, in_channels, out_channels)
        self.graph_norm = StackedBatchNorm(num_streams, out_channels)
        self.temporal_conv = TemporalConvolution(num_streams, out_channels, TEMPORAL_KERNEL, stride)
        self.temporal_norm = StackedBatchNorm(num_streams, out_channels)
        self.dropout = dropout
        self.has_residual = residual
        self.residual: nn.Sequential | None = None
        if residual and (in_channels != out_channels or stride != 1):
            self.residual = nn.Sequential(
                GraphConvolution(num_streams, in_channels, out_channels, partitions=1),
                StackedBatchNorm(num_streams, out_channels),
            )

    def forward(
        self, x: Tensor, graph: Graph, statistics: BatchStatistics, seed: Tensor | None, layer: int, pool: int
    ) -> Tensor:
        """x (S, B, T, V, C) → (S, B, ceil(T / stride), V, out), or its mean (S, B / pool, out) with ``pool`` > 0."""
        graph_conv, temporal_conv = self.graph_conv, self.temporal_conv
        y, *moments = ops.graph_convolution(
            x, graph_conv.weight, graph_conv.bias, self.importance, graph.adjacency, graph.edges,
            statistics=self.training,
        )  # fmt: skip
        scale, shift = self._coefficients(self.graph_norm, y, moments, statistics)
        y, *moments = ops.temporal_convolution(
            y, scale, shift, temporal_conv.weight, temporal_conv.bias,
            stride=temporal_conv.stride, statistics=self.training,
        )  # fmt: skip
        scale, shift = self._coefficients(self.temporal_norm, y, moments, statistics)
        residual, coefficients = x if self.has_residual else None, (None, None)
        if self.residual is not None:
            residual, *moments = self._project(x, graph)
            coefficients = self._coefficients(self.residual[1], residual, moments, statistics)
        return ops.residual_activation(
            y, scale, shift, residual, *coefficients,
            dropout=self.dropout if self.training else 0.0, seed=seed, layer=layer, pool=pool,
        )  # fmt: skip

    def infer(self, x: Tensor, graph: Graph, pool: int) -> Tensor:
        """``forward`` in eval mode without gradient: norms, residual and ReLU as the products leave their registers."""
        y, _, _ = ops.graph_convolution(
            x, self.graph_conv.weight, self.graph_conv.bias, self.importance, graph.adjacency, graph.edges,
            statistics=False, **_output(self.graph_norm),
        )  # fmt: skip
        temporal_conv = self.temporal_conv
        arguments = (y, None, None, temporal_conv.weight, temporal_conv.bias)
        residual = x if self.has_residual else None
        if pool:
            y, _, _ = ops.temporal_convolution(*arguments, stride=temporal_conv.stride, statistics=False)
            coefficients = (None, None)
            if self.residual is not None:
                residual, _, _ = self._project(x, graph)
                coefficients = self.residual[1].running_coefficients()
            return ops.residual_activation(
                y, *self.temporal_norm.running_coefficients(), residual, *coefficients, pool=pool
            )
        if self.residual is not None:
            residual, _, _ = self._project(x, graph, output_activation=False, **_output(self.residual[1]))
        return ops.temporal_convolution(
            *arguments, stride=temporal_conv.stride, statistics=False, residual=residual, **_output(self.temporal_norm)
        )[0]

    def _project(self, x: Tensor, graph: Graph, **output: Tensor | bool) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.residual[0].weight, self.residual[0].bias
        return ops.graph_convolution(
            x, weight, bias, graph.identity.expand(weight.shape[0], 1, -1, -1), graph.identity, graph.identity_edges,
            stride=self.temporal_conv.stride, statistics=self.training, **output,
        )  # fmt: skip

    def _coefficients(
        self, norm: StackedBatchNorm, values: Tensor, moments: Sequence[Tensor], statistics: BatchStatistics
    ) -> tuple[Tensor, Tensor]:
        if not self.training:
            return norm.running_coefficients()
        mean, variance = statistics.add(norm, *moments, values[0, ..., 0].numel())
        return norm.coefficients(mean, variance)


def _output(norm: StackedBatchNorm) -> dict[str, Tensor]:
    scale, shift = norm.running_coefficients()
    return {"output_scale": scale, "output_shift": shift}


class MultiStreamSTGCN(nn.Module):
    """S ST-GCN encoders with weights of their own, run as one.

    Each stream behaves as an encoder alone (:class:`STGCNReference`): its own batch statistics, running statistics,
    importance and dropout. Ten blocks of ``h h h h 2h/2 2h 2h 4h/2 4h d`` channels and a head.

    Args:
        adjacency: (3, V, V) partitioned adjacency, from ``Layout.adjacency()``; one for all streams.
        num_streams: S.
        in_channels: channels C of the input.
        hidden_channels: h.
        feature_size: d, size of the feature.
        head_sizes: output sizes of the head's linear layers, with ReLU between them: ``(d, D)`` in pretraining,
            ``(classes,)`` in evaluation; empty for no head.
        dropout: probability in the blocks after the first.
        precision: ``"fp32"``; ``"bf16"`` for activations and products of the blocks in bfloat16, with sums, statistics,
            weights, features and head in float32; ``"auto"`` for bf16 where the device computes with it.

    Source: docs/method.md section 4.
    """

    def __init__(
        self,
        adjacency: Tensor,
        num_streams: int,
        *,
        in_channels: int = 3,
        hidden_channels: int = 16,
        feature_size: int = 256,
        head_sizes: Sequence[int] = (),
        dropout: float = 0.5,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        check_sizes(adjacency, hidden_channels, feature_size, dropout)
        if num_streams < 1:
            raise ValueError(f"num_streams must be at least 1, got {num_streams}")
        num_joints = adjacency.shape[-1]
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.feature_size = feature_size
        self.head_sizes = tuple(head_sizes)
        self.dropout = dropout
        self.precision = check_precision(precision)
        self.graph = Graph(adjacency)
        self.input_norm = InputNorm(num_streams, num_joints * in_channels)
        self.blocks = nn.ModuleList()
        channels = in_channels
        for index, (out_channels, stride) in enumerate(block_plan(hidden_channels, feature_size)):
            of_block = 0.0 if index == 0 else dropout
            self.blocks.append(
                Block(num_streams, channels, out_channels, stride, of_block, num_joints, residual=index > 0)
            )
            channels = out_channels
        self.head = stacked_head(num_streams, channels, head_sizes)
        initialize_weights(self)

    @property
    def num_streams(self) -> int:
        return self.input_norm.weight.shape[0]

    # ---- running

    def features(self, x: Tensor | EncoderInput, group: ProcessGroup | None = None) -> Tensor:
        """Features (S, N, d) of clips: the mean over frames and joints, then over persons.

        Args:
            x: clips (S, N, C, T, V, M), or an ``EncoderInput`` of them.
            group: processes with equally many clips, over which batch statistics are taken in training mode; ``None``
                for this process's alone.
        """
        x = self._as_input(x)
        statistics = BatchStatistics(group)
        y = self.input_norm(x, statistics).to(activation_dtype(self.precision, self.input_norm.weight))
        last = len(self.blocks) - 1
        if self.training or self._wants_gradient(y):
            seed = self._draw_seed(y.device) if self.training and self.dropout > 0 else None
            for layer, block in enumerate(self.blocks):
                y = block(y, self.graph, statistics, seed, layer, x.num_persons if layer == last else 0)
        else:
            for layer, block in enumerate(self.blocks):
                y = block.infer(y, self.graph, x.num_persons if layer == last else 0)
        if self.training:
            statistics.update_running_statistics()
        return y

    def forward(self, x: Tensor | EncoderInput, group: ProcessGroup | None = None) -> Tensor:
        """The heads' outputs (S, N, ...) for clips (S, N, C, T, V, M), or for an ``EncoderInput`` of them.

        ``group`` is as for ``features``.
        """
        return self.head(self.features(x, group))

    def of_streams(self, x: Tensor | EncoderInput, streams: Sequence[int]) -> Tensor:
        """``forward`` of some streams alone, on the input of those; in eval mode, since statistics are not kept."""
        if list(streams) == list(range(self.num_streams)):
            return self(x)
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        chosen = {name: t[list(streams)] for name, t in tensors.items() if not name.startswith("graph.")}
        return torch.func.functional_call(self, chosen, (x,))

    def _as_input(self, x: Tensor | EncoderInput) -> EncoderInput:
        num_joints = self.graph.adjacency.shape[-1]
        if isinstance(x, Tensor):
            sizes = (self.num_streams, self.in_channels, num_joints)
            if x.dim() != 6 or (x.shape[0], x.shape[2], x.shape[4]) != sizes:
                raise ValueError(f"x must be ({sizes[0]}, N, {sizes[1]}, T, {num_joints}, M), got {describe(x)}")
            x = EncoderInput.of_clips(x)
        sizes = (self.num_streams, num_joints, self.in_channels)
        if x.values.dim() != 5 or (x.values.shape[0], *x.values.shape[3:]) != sizes:
            raise ValueError(f"x must be ({sizes[0]}, N·M, T, {sizes[1]}, {sizes[2]}), got {describe(x.values)}")
        if x.num_persons < 1 or x.values.shape[1] % x.num_persons:
            raise ValueError(f"num_persons must divide the {x.values.shape[1]} sequences of x, got {x.num_persons}")
        return x

    def _wants_gradient(self, y: Tensor) -> bool:
        return torch.is_grad_enabled() and (y.requires_grad or any(p.requires_grad for p in self.blocks.parameters()))

    @staticmethod
    def _draw_seed(device: torch.device) -> Tensor:
        # On the device, so that nothing waits for it and a captured step draws another one every time.
        return torch.randint(torch.iinfo(torch.int64).max, (1,), device=device)

    # ---- streams on their own

    def stream_tensors(self, stream: int) -> dict[str, Tensor]:
        """Parameters and buffers of one stream under the names and in the shapes of a single encoder's
        (``STGCNReference.state_dict()``), sharing memory with this module's.
        """
        with torch.device("meta"):
            single = STGCNReference(
                self.graph.adjacency,
                in_channels=self.in_channels,
                hidden_channels=self.hidden_channels,
                feature_size=self.feature_size,
                head_sizes=self.head_sizes,
            )
        stacked = {name: tensor.detach() for name, tensor in self.state_dict(keep_vars=True).items()}
        tensors = {"adjacency": stacked.pop("graph.adjacency")}
        shapes = {name: tensor.shape for name, tensor in single.state_dict().items()}
        tensors.update({name: tensor[stream].view(shapes[name]) for name, tensor in stacked.items()})
        return {name: tensors[name] for name in shapes}

    @torch.no_grad()
    def load_stream(self, stream: int, state: Mapping[str, Tensor]) -> None:
        """Copies a single encoder's ``state_dict()`` into one stream.

        Raises:
            ValueError: its names, shapes or graph are not those of a stream.
        """
        tensors = self.stream_tensors(stream)
        wrong = [name for name in tensors if name not in state or state[name].shape != tensors[name].shape]
        wrong += [name for name in state if name not in tensors]
        if wrong:
            raise ValueError(f"state must hold a stream's tensors, got other {', '.join(wrong)}")
        if not torch.allclose(tensors["adjacency"], state["adjacency"].to(tensors["adjacency"])):
            raise ValueError("state must be of an encoder with the same graph, got another adjacency")
        for name, tensor in tensors.items():
            tensor.copy_(state[name])

    @classmethod
    def stack(cls, encoders: Iterable[STGCNReference | STGCN], *, precision: str = "fp32") -> MultiStreamSTGCN:
        """Single encoders of the same sizes and graph as one module; the weights are copied."""
        encoders = tuple(encoders)
        if not encoders:
            raise ValueError("encoders must hold at least one, got none")
        states = [e.stream_tensors(0) if isinstance(e, MultiStreamSTGCN) else e.state_dict() for e in encoders]
        first = encoders[0]
        stacked = cls(
            states[0]["adjacency"],
            len(encoders),
            in_channels=first.in_channels,
            hidden_channels=states[0]["blocks.0.temporal_conv.weight"].shape[0],
            feature_size=first.feature_size,
            head_sizes=[layer.out_features for layer in first.head if hasattr(layer, "out_features")],
            dropout=first.dropout if isinstance(first, MultiStreamSTGCN) else first.blocks[-1].dropout.p,
            precision=precision,
        ).to(states[0]["adjacency"])
        for stream, state in enumerate(states):
            stacked.load_stream(stream, state)
        return stacked.train(first.training)

    def unstack(self) -> list[STGCN]:
        """Every stream as an encoder of its own; the weights are copied."""
        return [self._single(STGCN, stream, precision=self.precision) for stream in range(self.num_streams)]

    def to_reference(self, stream: int) -> STGCNReference:
        """A stream as an encoder in plain PyTorch; the weights are copied."""
        return self._single(STGCNReference, stream)

    def _single(self, kind: type, stream: int, **arguments: str) -> STGCN | STGCNReference:
        single = kind(
            self.graph.adjacency,
            in_channels=self.in_channels,
            hidden_channels=self.hidden_channels,
            feature_size=self.feature_size,
            head_sizes=self.head_sizes,
            dropout=self.dropout,
            **arguments,
        ).to(self.graph.adjacency)
        tensors = self.stream_tensors(stream)
        if isinstance(single, STGCN):
            single.load_stream(0, tensors)
        else:
            single.load_state_dict(tensors)
        return single.train(self.training)


class STGCN(MultiStreamSTGCN):
    """One ST-GCN encoder: :class:`MultiStreamSTGCN` with a single stream, and without the stream dimension.

    Args:
        adjacency: (3, V, V) partitioned adjacency, from ``Layout.adjacency()``.
        sizes: as for :class:`MultiStreamSTGCN`.
    """

    def __init__(self, adjacency: Tensor, **sizes: int | float | str | Sequence[int]) -> None:
        super().__init__(adjacency, 1, **sizes)

    def features(self, x: Tensor | EncoderInput, group: ProcessGroup | None = None) -> Tensor:
        """Features (N, d) of clips (N, C, T, V, M), or of an ``EncoderInput`` of them."""
        return super().features(self._with_stream(x), group)[0]

    def forward(self, x: Tensor | EncoderInput, group: ProcessGroup | None = None) -> Tensor:
        """The head's output (N, ...) for clips (N, C, T, V, M), or for an ``EncoderInput`` of them."""
        return self.head(super().features(self._with_stream(x), group))[0]

    def _with_stream(self, x: Tensor | EncoderInput) -> Tensor | EncoderInput:
        num_joints = self.graph.adjacency.shape[-1]
        if isinstance(x, Tensor):
            if x.dim() != 5 or x.shape[1] != self.in_channels or x.shape[3] != num_joints:
                raise ValueError(f"x must be (N, {self.in_channels}, T, {num_joints}, M), got {describe(x)}")
            return x.unsqueeze(0)
        if x.values.dim() != 4 or tuple(x.values.shape[2:]) != (num_joints, self.in_channels):
            raise ValueError(f"x must be (N·M, T, {num_joints}, {self.in_channels}), got {describe(x.values)}")
        known = x.mean is not None and x.variance is not None
        mean, variance = (x.mean.unsqueeze(0), x.variance.unsqueeze(0)) if known else (None, None)
        return EncoderInput(x.values.unsqueeze(0), x.num_persons, mean, variance)
