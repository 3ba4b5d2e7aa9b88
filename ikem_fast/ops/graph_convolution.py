"""Graph convolution: joints gathered along the edges of a skeleton, then a product over channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ikem_fast import _extension
from ikem_fast.ops._checks import as_computed, check_constant, computed_dtype, describe, has_kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_MOST_JOINTS_ON_CUDA, _MOST_PARTITIONS_ON_CUDA = 128, 12


def graph_edges(adjacency: Tensor) -> Tensor:
    """The edges (E, 3) int32 of a partitioned adjacency (P, V, V): the positions of what is not zero.

    An edge is (partition, from joint, to joint). They are sorted by joint they lead to, partition and joint they come
    from, and lie on the adjacency's device. This waits for a GPU: call it once, not in every step.

    Raises:
        ValueError: an adjacency of another shape.
    """
    if not isinstance(adjacency, Tensor) or adjacency.dim() != 3 or adjacency.shape[1] != adjacency.shape[2]:
        raise ValueError(f"adjacency must be (P, V, V), got {describe(adjacency)}")
    return adjacency.permute(2, 0, 1).nonzero()[:, [1, 2, 0]].to(torch.int32).contiguous()


def graph_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    importance: Tensor,
    adjacency: Tensor,
    edges: Tensor,
    *,
    stride: int = 1,
    statistics: bool = True,
    output_scale: Tensor | None = None,
    output_shift: Tensor | None = None,
    output_activation: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Graph convolution of S streams, each with weights of its own, and the statistics of what it gives.

    With ``A = adjacency * importance`` on the edges and 0 elsewhere, frame t and joint w of the result are
    ``sum over p of ((sum over v of A[p, v, w] x[t * stride, v]) @ weight[p].T + bias[p] * sum over v of A[p, v, w])``,
    that is, a 1x1 convolution to P groups of channels of which each is multiplied by its partition of the graph. With
    one partition, the identity, it is a plain 1x1 convolution.

    Joints are gathered before the product, along the edges alone; nothing of P times the channels is kept. float64 and
    float32 are computed as they are. For bfloat16, x and y are bfloat16, the factors of products are rounded to it and
    the sums float32. All else is float32, for float64 x float64. The same bits every time for the same number of
    threads. On a device without a kernel this is :func:`graph_convolution_reference`.

    Args:
        x: (S, B, T, V, C_in) float32, bfloat16 or (not compiled for CUDA) float64: sequences of T frames.
        weight: (S, P, C_out, C_in).
        bias: (S, P, C_out).
        importance: (S, P, V, V).
        adjacency: (P, V, V), without gradient.
        edges: (E, 3) int32, from :func:`graph_edges`.
        stride: of frames; 1 or more.
        statistics: also compute mean and variance.
        output_scale: (S, C_out), with ``output_shift``: y becomes ``output_scale * y + output_shift``. For inference:
            without gradient and statistics.
        output_shift: (S, C_out).
        output_activation: of what scale and shift gave, negative numbers become 0. Not looked at without them.

    Returns:
        y (S, B, ceil(T / stride), V, C_out) of x's dtype; mean and (biased) variance (S, C_out) of its numbers before
        they were rounded, both differentiable, 0 where there are no numbers; with ``statistics=False`` of shape (0,).

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; a scale without a shift, with statistics or where a
            gradient is wanted; on the CPU, edges out of range or order.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.
    """
    _check_arguments(x, weight, bias, importance, adjacency, edges, stride, statistics, output_scale, output_shift)
    _extension.require()
    if not _has_kernel(x, weight):
        return graph_convolution_reference(
            x,
            weight,
            bias,
            importance,
            adjacency,
            edges,
            stride=stride,
            statistics=statistics,
            output_scale=output_scale,
            output_shift=output_shift,
            output_activation=output_activation,
        )
    return torch.ops.ikem_fast.graph_convolution(
        x,
        weight,
        bias,
        importance,
        adjacency,
        edges,
        stride,
        statistics,
        output_scale,
        output_shift,
        output_activation,
    )


def graph_convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    importance: Tensor,
    adjacency: Tensor,
    edges: Tensor,
    *,
    stride: int = 1,
    statistics: bool = True,
    output_scale: Tensor | None = None,
    output_shift: Tensor | None = None,
    output_activation: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`graph_convolution` in plain PyTorch: the same arguments, results and errors."""
    _check_arguments(x, weight, bias, importance, adjacency, edges, stride, statistics, output_scale, output_shift)
    dtype = x.dtype
    partition, start, end = edges.long().unbind(1)
    on_edges = torch.zeros_like(adjacency)
    on_edges[partition, start, end] = adjacency[partition, start, end]
    graph = on_edges * importance
    gathered = torch.einsum("spvw,sbtvc->sbtwpc", graph, as_computed(x[:, :, ::stride]))
    y = torch.einsum("sbtwpc,spoc->sbtwo", _rounded(gathered, dtype), _rounded(weight, dtype))
    y = y + torch.einsum("spo,spw->swo", bias, graph.sum(dim=2))[:, None, None]
    if output_scale is not None and output_shift is not None:
        y = y * output_scale[:, None, None, None] + output_shift[:, None, None, None]
        y = y.relu() if output_activation else y
    if not statistics:
        nothing = y.new_zeros(0)
        return y.to(dtype), nothing, nothing.clone()
    if y.numel() == 0:
        zeros = y.sum(dim=(1, 2, 3))
        return y.to(dtype), zeros, zeros.clone()
    variance, mean = torch.var_mean(y, dim=(1, 2, 3), correction=0)
    return y.to(dtype), mean, variance


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of the computed dtype as exact as ``dtype`` holds them."""
    return values if values.dtype == dtype else values.to(dtype).to(values.dtype)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    fits = x.shape[3] <= _MOST_JOINTS_ON_CUDA and weight.shape[1] <= _MOST_PARTITIONS_ON_CUDA and x.shape[4] > 0
    return has_kernel(x) and (not x.is_cuda or fits)


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    importance: Tensor,
    adjacency: Tensor,
    edges: Tensor,
    stride: int,
    statistics: bool,
    output_scale: Tensor | None,
    output_shift: Tensor | None,
) -> None:
    if not isinstance(x, Tensor) or x.dim() != 5 or x.dtype not in _DTYPES:
        raise ValueError(f"x must be (S, B, T, V, C) float32, bfloat16 or float64, got {describe(x)}")
    streams, _, _, joints, channels = x.shape
    dtype = computed_dtype(x)
    num_partitions, out_channels = weight.shape[1:3] if isinstance(weight, Tensor) and weight.dim() == 4 else (1, 1)
    of_out_channels = ("(S, C_out)", (streams, out_channels))
    for name, value, shape, sizes in (
        ("weight", weight, "(S, P, C_out, C_in)", (streams, num_partitions, out_channels, channels)),
        ("bias", bias, "(S, P, C_out)", (streams, num_partitions, out_channels)),
        ("importance", importance, "(S, P, V, V)", (streams, num_partitions, joints, joints)),
        ("adjacency", adjacency, "(P, V, V)", (num_partitions, joints, joints)),
        ("output_scale", output_scale, *of_out_channels),
        ("output_shift", output_shift, *of_out_channels),
    ):
        if value is None and name.startswith("output_"):
            continue
        if not isinstance(value, Tensor) or value.shape != sizes or value.dtype != dtype:
            expected = f"{shape} = {sizes} {str(dtype).removeprefix('torch.')}"
            raise ValueError(f"{name} must be {expected} for x {describe(x)}, got {describe(value)}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    if not isinstance(edges, Tensor) or edges.dim() != 2 or edges.shape[1] != 3 or edges.dtype != torch.int32:
        raise ValueError(f"edges must be (E, 3) int32, from graph_edges, got {describe(edges)}")
    if edges.device != x.device:
        raise ValueError(f"edges must be on x's device {x.device}, got {edges.device}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    check_constant("adjacency", adjacency)
    if (output_scale is None) != (output_shift is None):
        raise ValueError("output_scale and output_shift must be given together")
    if output_scale is not None:
        if statistics:
            raise ValueError("statistics must be False with output_scale, got True")
        for name, value in (
            ("x", x),
            ("weight", weight),
            ("bias", bias),
            ("importance", importance),
            ("output_scale", output_scale),
            ("output_shift", output_shift),
        ):
            if torch.is_grad_enabled() and value.requires_grad:
                raise ValueError(f"{name} must not require a gradient with output_scale: use torch.no_grad()")


def _fake(
    x,
    weight,
    bias,
    importance,
    adjacency,
    edges,
    stride,
    statistics,
    output_scale,
    output_shift,
    output_activation,
):
    streams, batch, frames, joints, _ = x.shape
    out_channels = weight.shape[2]
    y = x.new_empty((streams, batch, (frames + stride - 1) // stride, joints, out_channels))
    mean = x.new_empty((streams, out_channels) if statistics else (0,), dtype=computed_dtype(x))
    return y, mean, torch.empty_like(mean)


def _fake_backward(
    x,
    weight,
    bias,
    importance,
    adjacency,
    edges,
    stride,
    y,
    mean,
    y_gradient,
    mean_gradient,
    variance_gradient,
    with_x_gradient,
):
    of_x = x.new_empty(x.shape if with_x_gradient else (0,))
    return of_x, *(value.new_empty(value.shape) for value in (weight, bias, importance))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, importance, adjacency, edges, ctx.stride, _, output_scale, _, _ = inputs
    y, mean, _ = output
    ctx.set_materialize_grads(False)
    ctx.is_inference = output_scale is not None
    ctx.save_for_backward(x, weight, bias, importance, adjacency, edges, y, mean)


@once_differentiable
def _backward(ctx, y_gradient: Tensor | None, mean_gradient: Tensor | None, variance_gradient: Tensor | None):
    nothing = (None,) * 7  # adjacency, edges, stride, statistics, output_scale, output_shift, output_activation
    if y_gradient is None and mean_gradient is None and variance_gradient is None:
        return None, None, None, None, *nothing
    if ctx.is_inference:
        raise RuntimeError("graph_convolution has no gradient with output_scale")
    x, weight, bias, importance, adjacency, edges, y, mean = ctx.saved_tensors
    if y_gradient is None:
        y_gradient = y.new_zeros(()).expand_as(y)
    of_x, *of_parameters = torch.ops.ikem_fast.graph_convolution_backward(
        x,
        weight,
        bias,
        importance,
        adjacency,
        edges,
        ctx.stride,
        y,
        mean,
        y_gradient,
        mean_gradient if mean.numel() else None,
        variance_gradient if mean.numel() else None,
        ctx.needs_input_grad[0],
    )
    return of_x if ctx.needs_input_grad[0] else None, *of_parameters, *nothing


if _extension.available():
    torch.library.register_fake("ikem_fast::graph_convolution", _fake)
    torch.library.register_fake("ikem_fast::graph_convolution_backward", _fake_backward)
    torch.library.register_autograd("ikem_fast::graph_convolution", _backward, setup_context=_setup_context)
