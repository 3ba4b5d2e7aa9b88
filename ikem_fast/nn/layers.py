"""Layers with stacked parameters: one set of weights per stream, the stream dimension first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ikem_fast import ops
from ikem_fast.nn.parts import NUM_PARTITIONS, EncoderInput
from ikem_fast.nn.synchronised_statistics import synchronise_moments


class StackedLinear(nn.Module):
    """S linear layers."""

    weight_mean = 0.0

    def __init__(self, num_streams: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(num_streams, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_streams, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x (S, N, in) → (S, N, out)."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)


def stacked_head(num_streams: int, in_features: int, sizes: Sequence[int]) -> nn.Sequential:
    """S heads of linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.ReLU()] if layers else []
        layers.append(StackedLinear(num_streams, in_features, size))
        in_features = size
    return nn.Sequential(*layers)


class GraphConvolution(nn.Module):
    """S graph convolutions over P partitions; P = 1 for a 1x1 convolution."""

    weight_mean = 0.0

    def __init__(self, num_streams: int, in_channels: int, out_channels: int, partitions: int = NUM_PARTITIONS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_streams, partitions, out_channels, in_channels))
        self.bias = nn.Parameter(torch.empty(num_streams, partitions, out_channels))


class TemporalConvolution(nn.Module):
    """S convolutions over frames."""

    weight_mean = 0.0

    def __init__(self, num_streams: int, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(num_streams, channels, channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(num_streams, channels))


class StackedBatchNorm(nn.Module):
    """S batch norms as a scale and a shift per channel, for the operation after them to apply as it loads."""

    weight_mean = 1.0
    eps = 1e-5
    momentum = 0.1
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_streams: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_streams, channels))
        self.bias = nn.Parameter(torch.empty(num_streams, channels))
        self.register_buffer("running_mean", torch.zeros(num_streams, channels))
        self.register_buffer("running_var", torch.ones(num_streams, channels))
        self.register_buffer("num_batches_tracked", torch.zeros(num_streams, dtype=torch.int64))

    def coefficients(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (S, C) of values with this mean and biased variance."""
        return ops.batch_norm_coefficients(mean, variance, self.weight, self.bias, self.eps)

    def running_coefficients(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (S, C) by the running statistics."""
        return self.coefficients(self.running_mean, self.running_var)


class BatchStatistics:
    """Means and variances of the batches that norms saw in one pass, for their running statistics.

    Args:
        group: processes whose batches are taken as one; ``None`` for this process's alone.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.norms: list[StackedBatchNorm] = []
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.corrections: list[float] = []

    def add(self, norm: StackedBatchNorm, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Takes in mean and biased variance of ``count`` values a channel; returns those to normalise with."""
        if self._group is not None:
            mean, variance = synchronise_moments(mean, variance, self._group)
            count *= self._group.size()
        self.norms.append(norm)
        self.means.append(mean.detach())
        self.variances.append(variance.detach())
        self.corrections.append(count / max(count - 1, 1))
        return mean, variance

    @torch.no_grad()
    def update_running_statistics(self) -> None:
        """Moves the running statistics of all norms at once, few launches instead of three per norm."""
        torch._foreach_lerp_([norm.running_mean for norm in self.norms], self.means, StackedBatchNorm.momentum)
        unbiased = torch._foreach_mul(self.variances, self.corrections)
        torch._foreach_lerp_([norm.running_var for norm in self.norms], unbiased, StackedBatchNorm.momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in self.norms], 1)


class InputNorm(StackedBatchNorm):
    """Batch norms with one channel per joint and coordinate, shared by frames and persons.

    In training mode they take over an input's mean and variance where they are known, so that nobody need pass over
    the values for them.
    """

    def forward(self, x: EncoderInput, statistics: BatchStatistics) -> Tensor:
        """The normalised values (S, N·M, T, V, C)."""
        values, dtype = x.values, self.weight.dtype
        if values.dtype != dtype:
            values = values.to(dtype)
        if not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            if x.mean is None or x.variance is None:
                variance, mean = torch.var_mean(values, dim=(1, 2), correction=0)
            else:
                mean, variance = x.mean, x.variance
            mean, variance = mean.flatten(1).to(dtype), variance.flatten(1).to(dtype)
            mean, variance = statistics.add(self, mean, variance, values.shape[1] * values.shape[2])
        per_joint = (values.shape[0], 1, 1, *values.shape[3:])
        scale = torch.rsqrt(variance + self.eps) * self.weight
        # The mean comes off first: of a joint that never moves nothing but its bias must be left.
        return torch.addcmul(self.bias.view(per_joint), values - mean.view(per_joint), scale.view(per_joint))
