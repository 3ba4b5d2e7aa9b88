"""One spatio-temporal graph convolutional encoder (ST-GCN) in plain PyTorch: the definition of the multi-stream one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ikem_fast.nn.parts import (
    NUM_PARTITIONS,
    TEMPORAL_KERNEL,
    EncoderInput,
    block_plan,
    check_sizes,
    initialize_weights,
)
from ikem_fast.ops._checks import describe


class InputNorm(nn.BatchNorm1d):
    """Batch norm with one channel per joint and coordinate, shared by frames and persons.

    In training mode it takes over an input's mean and variance where they are known, so that it need not pass over the
    values for them.
    """

    def forward(self, x: EncoderInput) -> Tensor:
        """The normalised values (N·M, T, V, C)."""
        if not self.training:
            return self._normalize(x.values, self.running_mean, self.running_var)
        if x.mean is None or x.variance is None:
            channels = x.values.flatten(2).transpose(1, 2)  # (N·M, V·C, T)
            return super().forward(channels).transpose(1, 2).view_as(x.values)
        mean, variance = (values.flatten() for values in (x.mean, x.variance))
        self._update_running_statistics(mean, variance, x.values.shape[0] * x.values.shape[1])
        return self._normalize(x.values, mean, variance)

    def _normalize(self, values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        scale = torch.rsqrt(variance + self.eps).to(self.weight.dtype) * self.weight
        # The mean comes off first: of a joint that never moves nothing but its bias must be left.
        centred = values - mean.to(values.dtype).view(values.shape[2:])
        return torch.addcmul(self.bias.view(values.shape[2:]), centred, scale.view(values.shape[2:]))

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class GraphConvolution(nn.Conv2d):
    """A 1x1 convolution to 3 groups of channels, then ``sum_k y_k A_k`` over the partitions of the graph."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, NUM_PARTITIONS * out_channels, 1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """x (B, C, T, V), adjacency (3, V, V) → (B, out, T, V)."""
        partitions = super().forward(x).unflatten(1, (NUM_PARTITIONS, -1))
        return torch.einsum("bkctv,kvw->bctw", partitions, adjacency)


class Block(nn.Module):
    """Graph convolution, BN, ReLU, 9x1 convolution, BN, dropout, + residual, ReLU (docs/method.md section 4)."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dropout: float, num_joints: int, residual: bool = True
    ) -> None:
        super().__init__()
        self.importance = nn.Parameter(torch.ones(NUM_PARTITIONS, num_joints, num_joints))
        self.graph_conv = GraphConvolution(in_channels, out_channels)
        self.graph_norm = nn.BatchNorm2d(out_channels)
        padding = (TEMPORAL_KERNEL // 2, 0)
        self.temporal_conv = nn.Conv2d(out_channels, out_channels, (TEMPORAL_KERNEL, 1), (stride, 1), padding)
        self.temporal_norm = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.has_residual = residual
        self.residual: nn.Module | None = None
        if residual and (in_channels != out_channels or stride != 1):
            self.residual = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, (stride, 1)), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """x (B, C, T, V), adjacency (3, V, V) → (B, out, ceil(T / stride), V)."""
        y = self.graph_norm(self.graph_conv(x, adjacency * self.importance)).relu()
        y = self.dropout(self.temporal_norm(self.temporal_conv(y)))
        if self.has_residual:
            y = y + (x if self.residual is None else self.residual(x))
        return y.relu()


class STGCNReference(nn.Module):
    """ST-GCN with ten blocks of ``h h h h 2h/2 2h 2h 4h/2 4h d`` channels and a head.

    Args:
        adjacency: (3, V, V) partitioned adjacency, from ``Layout.adjacency()``.
        in_channels: channels C of the input.
        hidden_channels: h.
        feature_size: d, size of the feature.
        head_sizes: output sizes of the head's linear layers, with ReLU between them: ``(d, D)`` in pretraining,
            ``(classes,)`` in evaluation; empty for no head.
        dropout: probability in the blocks after the first.

    Source: docs/method.md section 4.
    """

    adjacency: Tensor

    def __init__(
        self,
        adjacency: Tensor,
        *,
        in_channels: int = 3,
        hidden_channels: int = 16,
        feature_size: int = 256,
        head_sizes: tuple[int, ...] = (),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_sizes(adjacency, hidden_channels, feature_size, dropout)
        num_joints = adjacency.shape[-1]
        self.in_channels = in_channels
        self.feature_size = feature_size
        self.register_buffer("adjacency", adjacency.clone())
        self.input_norm = InputNorm(num_joints * in_channels)
        self.blocks = nn.ModuleList()
        channels = in_channels
        for index, (out_channels, stride) in enumerate(block_plan(hidden_channels, feature_size)):
            first = index == 0
            self.blocks.append(
                Block(channels, out_channels, stride, 0.0 if first else dropout, num_joints, residual=not first)
            )
            channels = out_channels
        layers: list[nn.Module] = []
        for size in head_sizes:
            layers += [nn.ReLU(), nn.Linear(channels, size)] if layers else [nn.Linear(channels, size)]
            channels = size
        self.head = nn.Sequential(*layers)
        initialize_weights(self)

    def features(self, x: Tensor | EncoderInput) -> Tensor:
        """Features (N, d) of clips: the mean over frames and joints, then over persons.

        Args:
            x: clips (N, C, T, V, M), or an ``EncoderInput`` of them.
        """
        if isinstance(x, Tensor):
            num_joints = self.adjacency.shape[-1]
            if x.dim() != 5 or x.shape[1] != self.in_channels or x.shape[3] != num_joints:
                raise ValueError(f"x must be (N, {self.in_channels}, T, {num_joints}, M), got {describe(x)}")
            x = EncoderInput.of_clips(x)
        self._check(x)
        y = self.input_norm(x).permute(0, 3, 1, 2)  # (N·M, C, T, V), channels last in memory
        for block in self.blocks:
            y = block(y, self.adjacency)
        return y.mean(dim=(2, 3)).unflatten(0, (-1, x.num_persons)).mean(dim=1)

    def _check(self, x: EncoderInput) -> None:
        num_joints = self.adjacency.shape[-1]
        if x.values.dim() != 4 or tuple(x.values.shape[2:]) != (num_joints, self.in_channels):
            raise ValueError(f"x must be (N·M, T, {num_joints}, {self.in_channels}), got {describe(x.values)}")
        if x.num_persons < 1 or x.values.shape[0] % x.num_persons:
            raise ValueError(f"num_persons must divide the {x.values.shape[0]} sequences of x, got {x.num_persons}")

    def forward(self, x: Tensor | EncoderInput) -> Tensor:
        """The head's output for clips (N, C, T, V, M), or for an ``EncoderInput`` of them."""
        return self.head(self.features(x))
