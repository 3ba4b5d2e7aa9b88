"""``temporal_convolution`` on CUDA: tap by tap in one kernel, or in the frequency domain around library products.

Wide channels make the taps' products many: T·K of them for T frames, less those that fall over the edges. In the basis
of a real discrete Fourier transform of N points there is one product for the constant and, as a complex number is a
pair of numbers, one of twice the rows' length and twice the width for each of the (N - 1) / 2 frequencies: for T = 13
and K = 9 (N = 17) 33 products instead of 97, between tensors that are N / T times the size. Pairs, and not the three
real products that a complex one can be had for: tensors of three numbers a frequency would take longer to read and
write than the fourth product takes. Long sequences are cut into tiles of frames, each looked at through a window.

Nothing waits for the device, so that a CUDA graph can hold all of it; sums are made in a fixed order. Each step of the
way through frequencies also is there in plain PyTorch: the definition of what the kernel does, which runs anywhere.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops._checks import computed_dtype
from ikem_fast.ops._queue_tiles import _as_kernel, _multiply

# Limits of csrc/cuda/spectral_transform.h.
_MOST_WINDOW = 24
_MOST_TILE = 16
_MOST_FREQUENCIES = 16
_MOST_TAPS = 27
# A tile must be longer than what it looks at besides.
_FEWEST_TILE = 4
# Of slots that are there at a time; more sequences are taken in pieces.
_SLOT_BYTES = 2 << 30
# The kernels read and write vectors of 16 bytes.
_CHANNEL_MULTIPLE = 8
# Of 128 x 128 results that a product over all rows should have, to keep most multiprocessors busy.
_WANTED_BLOCKS = 96
_MOST_PARTS = 8
# What an H100 reaches, roughly: bytes a second, operations a second of products by a library and of the direct kernels.
_BANDWIDTH = 3e12
_LIBRARY_RATE = {torch.bfloat16: 6e14, torch.float32: 4.5e13}
_DIRECT_RATE = {torch.bfloat16: 3e14, torch.float32: 2.5e13}
_LAUNCHES = 2e-5  # seconds that the way through frequencies loses with its launches


class SpectralPlan(NamedTuple):
    """How sequences are cut and which basis their tiles have.

    Attributes:
        tile_frames: of a tile.
        lead: frames of a window before the tile's own, and after them.
        frequencies: F, of a basis of N = 1 + 2 F points.
    """

    tile_frames: int
    lead: int
    frequencies: int

    @property
    def window(self) -> int:
        return self.tile_frames + 2 * self.lead

    @property
    def slots(self) -> int:
        return 1 + 2 * self.frequencies

    def tiles(self, num_frames: int) -> int:
        return math.ceil(num_frames / self.tile_frames)


def spectral_plan(num_frames: int, num_taps: int) -> SpectralPlan | None:
    """The plan for T frames and K taps, ``None`` where the kernels have none."""
    if num_taps > _MOST_TAPS:
        return None
    around = num_taps // 2
    if num_frames <= _MOST_TILE:
        # What goes round the end of the circle meets zeros where N is at least T + K // 2.
        plan = SpectralPlan(num_frames, 0, (num_frames + around) // 2)
    else:
        most = min(_MOST_TILE, _MOST_WINDOW - 2 * around)
        if most < _FEWEST_TILE:
            return None
        tile = math.ceil(num_frames / math.ceil(num_frames / most))
        plan = SpectralPlan(tile, around, (tile + 2 * around) // 2)
    return plan if plan.frequencies <= _MOST_FREQUENCIES else None


def prefers_spectral(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether the way through frequencies is likely the faster one for x (S, B, T, V, C_in) and weight."""
    streams, sequences, num_frames, joints, in_channels = x.shape
    out_channels, num_taps = weight.shape[1], weight.shape[3]
    plan = spectral_plan(num_frames, num_taps)
    if plan is None or stride != 1 or in_channels % _CHANNEL_MULTIPLE or out_channels % _CHANNEL_MULTIPLE:
        return False
    rows = streams * sequences * joints
    # Of one joint of one sequence: seconds for bytes of each number of a channel, and operations of each product.
    transfer = (in_channels + out_channels) * x.element_size() / _BANDWIDTH
    operations = 2 * in_channels * out_channels
    num_slots, num_products = plan.slots * plan.tiles(num_frames), (1 + 4 * plan.frequencies) * plan.tiles(num_frames)
    direct = max(num_frames * transfer, num_frames * num_taps * operations / _DIRECT_RATE[x.dtype])
    products = max(num_slots * transfer, num_products * operations / _LIBRARY_RATE[x.dtype])
    return rows * ((num_frames + num_slots) * transfer + products) + _LAUNCHES < rows * direct


@functools.lru_cache(maxsize=64)
def _points(num_points: int, frequencies: int, sign: float, normalized: bool) -> Tensor:
    """(N, points) float64: a constant, and a cosine and a sine of every frequency, over points around zero."""
    length = 1 + 2 * frequencies
    points = torch.arange(num_points, dtype=torch.float64, device="cpu") - (num_points - 1) / 2
    numbers = torch.arange(1, frequencies + 1, dtype=torch.float64, device="cpu")
    angles = 2 * math.pi / length * torch.outer(numbers, points)
    waves = torch.stack([angles.cos(), sign * angles.sin()], dim=1).flatten(0, 1)
    constant = torch.ones(1, num_points, dtype=torch.float64, device="cpu")
    if not normalized:
        return torch.cat([constant, waves])
    return torch.cat([constant / math.sqrt(length), math.sqrt(2 / length) * waves])


def frames_basis(num_points: int, frequencies: int) -> Tensor:
    """Orthonormal rows; of frames to slots as it is, of slots to frames its transpose."""
    return _points(num_points, frequencies, 1.0, True)


def taps_basis(num_taps: int, frequencies: int) -> Tensor:
    """Of taps to the factors of slots: y_t = sum over k of w_k h_(t + k - K // 2) turns by as much the other way."""
    return _points(num_taps, frequencies, -1.0, False)


@_as_kernel
def temporal_convolution(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    statistics: bool,
    output_scale: Tensor | None,
    output_shift: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``ikem_fast::temporal_convolution``."""
    chosen = spectral if _fits(x, weight) and prefers_spectral(x, weight, stride) else direct
    return chosen(x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual)


@_as_kernel
def temporal_convolution_backward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int,
    y: Tensor,
    mean: Tensor,
    y_gradient: Tensor,
    mean_gradient: Tensor | None,
    variance_gradient: Tensor | None,
    with_x_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``ikem_fast::temporal_convolution_backward``."""
    chosen = spectral_backward if _fits(x, weight) and prefers_spectral(x, weight, stride) else direct_backward
    return chosen(
        x, scale, shift, weight, stride, y, mean, y_gradient, mean_gradient, variance_gradient, with_x_gradient
    )


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether sizes can be estimated; of what does not fit, the direct way's checks tell."""
    return x.dim() == 5 and weight.dim() == 4 and x.dtype in _DIRECT_RATE


def direct(x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual):
    """The convolution by the kernels of csrc/cuda/temporal_convolution.cu, in channels that they take."""
    out_channels = bias.shape[-1]
    arguments = _whole_channels(x), _whole_channels(scale), _whole_channels(shift), _whole_weight(weight)
    y, mean, variance = torch.ops.ikem_fast._temporal_convolution_direct(
        *arguments, _whole_channels(bias), stride, statistics,
        _whole_channels(output_scale), _whole_channels(output_shift), _whole_channels(residual),
    )  # fmt: skip
    if statistics:
        mean, variance = (_first_channels(values, out_channels) for values in (mean, variance))
    return _first_channels(y, out_channels), mean, variance


def direct_backward(
    x, scale, shift, weight, stride, y, mean, y_gradient, mean_gradient, variance_gradient, with_x_gradient
):
    """The backward pass, likewise."""
    in_channels, out_channels = x.shape[-1], y_gradient.shape[-1]
    arguments = _whole_channels(x), _whole_channels(scale), _whole_channels(shift), _whole_weight(weight)
    of_x, of_scale, of_shift, of_weight, of_bias = torch.ops.ikem_fast._temporal_convolution_direct_backward(
        *arguments, stride, _whole_channels(y), _whole_channels(mean) if variance_gradient is not None else mean,
        _whole_channels(y_gradient), _whole_channels(mean_gradient), _whole_channels(variance_gradient),
        with_x_gradient,
    )  # fmt: skip
    if with_x_gradient:
        of_x = _first_channels(of_x, in_channels)
    if scale is not None:
        of_scale, of_shift = (_first_channels(values, in_channels) for values in (of_scale, of_shift))
    of_weight = of_weight[:, :out_channels, :in_channels].contiguous()
    return of_x, of_scale, of_shift, of_weight, _first_channels(of_bias, out_channels)


def _whole_channels(values: Tensor | None) -> Tensor | None:
    """With zeros for channels up to a multiple of what the kernels take at a time."""
    if values is None:
        return None
    missing = -values.shape[-1] % _CHANNEL_MULTIPLE
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def _whole_weight(weight: Tensor) -> Tensor:
    missing_out, missing_in = (-size % _CHANNEL_MULTIPLE for size in weight.shape[1:3])
    if not missing_out and not missing_in:
        return weight
    return torch.nn.functional.pad(weight, (0, 0, 0, missing_in, 0, missing_out))


def _first_channels(values: Tensor, channels: int) -> Tensor:
    return values if values.shape[-1] == channels else values[..., :channels].contiguous()


def spectral(x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual):
    """The convolution through frequencies."""
    plan = _require_plan(x, weight, stride)
    x, scale, shift, weight, bias, output_scale, output_shift, residual = _dense(
        x, scale, shift, weight, bias, output_scale, output_shift, residual
    )
    streams, sequences, *_ = x.shape
    out_channels = weight.shape[1]
    y = x.new_empty((*x.shape[:4], out_channels))
    moments = bias.new_empty((streams, sequences, 3, out_channels)) if statistics else None
    factors = _Slots.of_weight(weight, plan, x.dtype)
    for piece in _pieces(x, weight, plan):
        slots = _Slots.empty(x[:, piece], plan)
        frames_to_slots(slots, x[:, piece], scale, shift, plan.window, plan)
        products = slots.times(factors)
        del slots
        slots_to_frames(
            y[:, piece],
            None if moments is None else moments[:, piece],
            products,
            bias,
            output_scale,
            output_shift,
            None if residual is None else residual[:, piece],
            plan,
        )
        del products
    mean, variance = (bias.new_empty((streams, out_channels) if statistics else (0,)) for _ in range(2))
    if moments is not None:
        combine_statistics(mean, variance, moments)
    return y, mean, variance


def spectral_backward(
    x, scale, shift, weight, stride, y, mean, y_gradient, mean_gradient, variance_gradient, with_x_gradient
):
    """The backward pass through frequencies. The gradient of h is the convolution of that of y with the transpose."""
    plan = _require_plan(x, weight, stride)
    x, scale, shift, weight, y, y_gradient, mean_gradient, variance_gradient = _dense(
        x, scale, shift, weight, y, y_gradient, mean_gradient, variance_gradient
    )
    streams, sequences, *_ = x.shape
    num_values = y[0, ..., 0].numel()
    computed = computed_dtype(x)
    reads_y = variance_gradient is not None
    of_x = x.new_empty(x.shape if with_x_gradient else (0,))
    has_activation = scale is not None
    scale_sums, shift_sums = (
        x.new_empty((streams, sequences, x.shape[4]), dtype=computed) if has_activation else None for _ in range(2)
    )
    bias_sums = x.new_empty((streams, sequences, y.shape[4]), dtype=computed)
    factors = _Slots.of_weight(weight, plan, x.dtype) if with_x_gradient or has_activation else None
    single_gradient = pairs_gradient = None
    for piece in _pieces(x, weight, plan):
        made = (y[:, piece], mean.contiguous()) if reads_y else (None, None)
        given = (y_gradient[:, piece], *made, mean_gradient, variance_gradient, num_values)
        total = _Slots.empty(y_gradient[:, piece], plan)
        gradient_to_slots(total, bias_sums[:, piece], *given, plan.window, plan)
        if factors is not None:
            products = total.times(factors.transposed())
            slots_to_x_gradient(
                of_x[:, piece] if with_x_gradient else None,
                None if scale_sums is None else scale_sums[:, piece],
                None if shift_sums is None else shift_sums[:, piece],
                products,
                x[:, piece],
                scale,
                shift,
                plan,
            )
            del products
        if plan.lead:
            # What the weights have made in a tile is its own frames alone.
            gradient_to_slots(total, None, *given, plan.tile_frames, plan)
        slots = _Slots.empty(x[:, piece], plan)
        frames_to_slots(slots, x[:, piece], scale, shift, plan.window, plan)
        single, pairs = slots.transposed_times(total)
        del slots, total
        single_gradient = single if single_gradient is None else _sum_parts(single_gradient, single, 1)
        pairs_gradient = pairs if pairs_gradient is None else _sum_parts(pairs_gradient, pairs, 2)
    of_weight = torch.empty_like(weight)
    if single_gradient is None or pairs_gradient is None:
        of_weight.zero_()
    else:
        slots_to_weight_gradient(of_weight, single_gradient, pairs_gradient, plan)
    of_bias = x.new_empty((streams, y.shape[4]), dtype=computed)
    add_parts(of_bias, bias_sums)
    coefficients = (streams, x.shape[4]) if has_activation else (0,)
    of_scale, of_shift = (x.new_empty(coefficients, dtype=computed) for _ in range(2))
    if scale_sums is not None and shift_sums is not None:
        add_parts(of_scale, scale_sums)
        add_parts(of_shift, shift_sums)
    return of_x, of_scale, of_shift, of_weight, of_bias


def _sum_parts(sums: Tensor, parts: Tensor, dim: int) -> Tensor:
    """Both added up over their parts, as one part."""
    return sums.sum(dim=dim, keepdim=True) + parts.sum(dim=dim, keepdim=True)


def _require_plan(x: Tensor, weight: Tensor, stride: int) -> SpectralPlan:
    plan = spectral_plan(x.shape[2], weight.shape[3])
    if plan is None or stride != 1:
        raise ValueError(
            f"the spectral form is for stride 1 and few taps, got {x.shape[2]} frames, {weight.shape[3]} taps and "
            f"stride {stride}"
        )
    return plan


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Contiguous and, as the kernels' vectors are, aligned."""
    dense = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    return tuple(tensor.clone() if tensor is not None and tensor.data_ptr() % 16 else tensor for tensor in dense)


def _pieces(x: Tensor, weight: Tensor, plan: SpectralPlan) -> list[slice]:
    """Of the sequences, so that the slots of x and of y of a piece stay below their limit."""
    streams, sequences, num_frames, joints, in_channels = x.shape
    of_sequence = (
        streams * plan.slots * plan.tiles(num_frames) * joints * (in_channels + weight.shape[1]) * x.element_size()
    )
    count = max(1, math.ceil(sequences / max(1, _SLOT_BYTES // max(1, of_sequence))))
    bounds = [sequences * i // count for i in range(count + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds) if end > begin]


class _Slots(NamedTuple):
    """Numbers of the constant and of all frequencies: of frames single (S, R, C) and pairs (S, F, R, 2 C), of weights
    single (S, C_in, C_out) and pairs (S, F, 2 C_in, 2 C_out).
    """

    single: Tensor
    pairs: Tensor

    @classmethod
    def empty(cls, frames: Tensor, plan: SpectralPlan) -> _Slots:
        streams, sequences, num_frames, joints, channels = frames.shape
        rows = sequences * plan.tiles(num_frames) * joints
        return cls(
            frames.new_empty((streams, rows, channels)),
            frames.new_empty((streams, plan.frequencies, rows, 2 * channels)),
        )

    @classmethod
    def of_weight(cls, weight: Tensor, plan: SpectralPlan, dtype: torch.dtype) -> _Slots:
        streams, out_channels, in_channels, _ = weight.shape
        slots = cls(
            weight.new_empty((streams, in_channels, out_channels), dtype=dtype),
            weight.new_empty((streams, plan.frequencies, 2 * in_channels, 2 * out_channels), dtype=dtype),
        )
        weight_to_slots(slots, weight, plan)
        return slots

    def transposed(self) -> _Slots:
        return _Slots(self.single.transpose(1, 2), self.pairs.transpose(2, 3))

    def times(self, factors: _Slots) -> _Slots:
        """Slots of frames by those of weights, rounded to their dtype."""
        single = torch.bmm(self.single, factors.single)
        pairs = torch.bmm(self.pairs.flatten(0, 1), factors.pairs.flatten(0, 1))
        return _Slots(single, pairs.unflatten(0, self.pairs.shape[:2]))

    def transposed_times(self, other: _Slots) -> _Slots:
        """Their products over the rows in parts, (S, parts, C, C') and (S, F, parts, 2 C, 2 C'), not rounded."""
        products = []
        for left, right in zip(self, other, strict=True):
            rows = left.shape[-2]
            left, right = left.flatten(0, -3), right.flatten(0, -3)
            parts = _parts(left.shape[0], left.shape[2], right.shape[2], rows)
            left, right = (side.reshape(-1, rows // parts, side.shape[2]) for side in (left, right))
            product = _multiply(left.transpose(1, 2), right, computed_dtype(left))
            products.append(product.unflatten(0, (-1, parts)))
        single, pairs = products
        return _Slots(single, pairs.unflatten(0, self.pairs.shape[:2]))


def _parts(batch: int, height: int, width: int, rows: int) -> int:
    """In how many parts the rows of a product over them are taken, so that there is work for a whole GPU."""
    blocks = batch * math.ceil(height / 128) * math.ceil(width / 128)
    wanted = min(_MOST_PARTS, math.ceil(_WANTED_BLOCKS / max(1, blocks)))
    return max(parts for parts in range(1, wanted + 1) if rows % parts == 0)


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64 and _extension.cuda_available()


# Steps. Each runs its kernel or, where there is none, says in plain PyTorch what the kernel does.


def frames_to_slots(
    slots: _Slots, x: Tensor, scale: Tensor | None, shift: Tensor | None, window: int, plan: SpectralPlan
) -> None:
    """``slots`` of relu(scale · x + shift), rounded to x's dtype, or of x (S, B, T, V, C) itself, through windows."""
    lead = (window - plan.tile_frames) // 2
    basis = frames_basis(window, plan.frequencies)
    if _has_kernels(x):
        torch.ops.ikem_fast._spectral_slots_(*slots, x, scale, shift, basis.flatten().tolist(), plan.tile_frames, lead)
        return
    h = _computed(x)
    if scale is not None and shift is not None:
        h = torch.relu(_of_channels(scale) * h + _of_channels(shift)).to(x.dtype).to(h.dtype)
    _project(slots, h, basis, lead, plan)


def gradient_to_slots(
    slots: _Slots,
    sums: Tensor | None,
    y_gradient: Tensor,
    y: Tensor | None,
    mean: Tensor | None,
    mean_gradient: Tensor | None,
    variance_gradient: Tensor | None,
    num_values: int,
    window: int,
    plan: SpectralPlan,
) -> None:
    """``slots`` of the gradient that reaches y, and ``sums`` (S, B, C) of it over each sequence.

    Args:
        slots: written.
        sums: written, or ``None``.
        y_gradient: (S, B, T, V, C).
        y: likewise, and mean (S, C): read beside ``variance_gradient``.
        mean: see y.
        mean_gradient: (S, C) or ``None``.
        variance_gradient: (S, C) or ``None``.
        num_values: of a channel of a stream, in all.
        window: frames that a tile is looked at through, its own or those of the plan.
        plan: see :class:`SpectralPlan`.
    """
    lead = (window - plan.tile_frames) // 2
    basis = frames_basis(window, plan.frequencies)
    if _has_kernels(y_gradient):
        torch.ops.ikem_fast._spectral_gradient_slots_(
            *slots, sums, y_gradient, y, mean, mean_gradient, variance_gradient, num_values,
            basis.flatten().tolist(), plan.tile_frames, lead,
        )  # fmt: skip
        return
    total = _computed(y_gradient)
    if mean_gradient is not None:
        total = total + _of_channels(mean_gradient) / num_values
    if variance_gradient is not None and y is not None and mean is not None:
        total = total + 2 / num_values * _of_channels(variance_gradient) * (y.to(total.dtype) - _of_channels(mean))
    if sums is not None:
        sums.copy_(total.sum(dim=(2, 3)))
    _project(slots, total, basis, lead, plan)


def slots_to_frames(
    y: Tensor,
    moments: Tensor | None,
    slots: _Slots,
    bias: Tensor,
    output_scale: Tensor | None,
    output_shift: Tensor | None,
    residual: Tensor | None,
    plan: SpectralPlan,
) -> None:
    """``y`` (S, B, T, V, C) = frames of the slots + bias; with an output's scale relu(scale · y + shift + residual).

    ``moments`` (S, B, 3, C), unless ``None``: of every sequence's y before it is rounded their number, mean, and sum of
    squared differences from it.
    """
    basis = frames_basis(plan.tile_frames, plan.frequencies)
    if _has_kernels(y):
        torch.ops.ikem_fast._spectral_frames_(
            y, moments, *slots, bias, output_scale, output_shift, residual, basis.flatten().tolist(), plan.tile_frames
        )
        return
    made = _project_back(slots, basis, y.shape) + _of_channels(bias)
    if moments is not None:
        deviation, mean = torch.var_mean(made, dim=(2, 3), correction=0)
        count = made.shape[2] * made.shape[3]
        moments.copy_(torch.stack([torch.full_like(mean, count), mean, count * deviation], dim=2))
    if output_scale is not None and output_shift is not None:
        made = _of_channels(output_scale) * made + _of_channels(output_shift)
        made = torch.relu(made if residual is None else made + residual.to(made.dtype))
    y.copy_(made)


def slots_to_x_gradient(
    x_gradient: Tensor | None,
    scale_sums: Tensor | None,
    shift_sums: Tensor | None,
    slots: _Slots,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    plan: SpectralPlan,
) -> None:
    """``x_gradient`` (S, B, T, V, C), unless ``None``, and the sums (S, B, C) of the gradients of scale and shift over
    each sequence, from the slots of the gradient of the activation.
    """
    basis = frames_basis(plan.tile_frames, plan.frequencies)
    if _has_kernels(x):
        torch.ops.ikem_fast._spectral_x_gradient_(
            x_gradient, scale_sums, shift_sums, *slots, x, scale, shift, basis.flatten().tolist(), plan.tile_frames
        )
        return
    gradient = _project_back(slots, basis, x.shape)
    if scale is not None and shift is not None and scale_sums is not None and shift_sums is not None:
        values = x.to(gradient.dtype)
        gradient = gradient * (_of_channels(scale) * values + _of_channels(shift) > 0)
        scale_sums.copy_((gradient * values).sum(dim=(2, 3)))
        shift_sums.copy_(gradient.sum(dim=(2, 3)))
        gradient = _of_channels(scale) * gradient
    if x_gradient is not None:
        x_gradient.copy_(gradient)


def weight_to_slots(slots: _Slots, weight: Tensor, plan: SpectralPlan) -> None:
    """``slots`` of weight (S, C_out, C_in, K): its spectrum U, pairs as (Re U, Im U; -Im U, Re U)."""
    basis = taps_basis(weight.shape[3], plan.frequencies)
    if _has_kernels(slots.single):
        torch.ops.ikem_fast._spectral_weights_(*slots, weight, basis.flatten().tolist())
        return
    spectrum = torch.einsum("nk,soik->snio", basis.to(weight), weight)
    real, imaginary = spectrum[:, 1::2], spectrum[:, 2::2]
    slots.single.copy_(spectrum[:, 0])
    slots.pairs.copy_(torch.cat([torch.cat([real, imaginary], dim=3), torch.cat([-imaginary, real], dim=3)], dim=2))


def slots_to_weight_gradient(weight_gradient: Tensor, single: Tensor, pairs: Tensor, plan: SpectralPlan) -> None:
    """The transpose of :func:`weight_to_slots`, of the sums over the parts of single (S, parts, C_in, C_out) and pairs
    (S, F, parts, 2 C_in, 2 C_out).
    """
    basis = taps_basis(weight_gradient.shape[3], plan.frequencies)
    if _has_kernels(weight_gradient):
        torch.ops.ikem_fast._spectral_weight_gradient_(weight_gradient, single, pairs, basis.flatten().tolist())
        return
    upper, lower = pairs.sum(dim=2).chunk(2, dim=2)
    (real, imaginary), (minus_imaginary, also_real) = upper.chunk(2, dim=3), lower.chunk(2, dim=3)
    waves = torch.stack([real + also_real, imaginary - minus_imaginary], dim=2).flatten(1, 2)
    spectrum = torch.cat([single.sum(dim=1).unsqueeze(1), waves], dim=1)
    weight_gradient.copy_(torch.einsum("nk,snio->soik", basis.to(spectrum), spectrum))


def combine_statistics(mean: Tensor, variance: Tensor, moments: Tensor) -> None:
    """``mean`` and biased ``variance`` (S, C) of all values of moments (S, B, 3, C); 0 of no values."""
    if _has_kernels(mean):
        torch.ops.ikem_fast._combine_channel_statistics_(mean, variance, moments)
        return
    count, means, deviations = moments.unbind(2)
    total = count.sum(dim=1).clamp(min=1)
    mean.copy_((count * means).sum(dim=1) / total)
    variance.copy_((deviations + count * (means - mean.unsqueeze(1)).square()).sum(dim=1) / total)


def add_parts(sums: Tensor, parts: Tensor) -> None:
    """``sums`` (S, C) = the sum over B of parts (S, B, C)."""
    if _has_kernels(sums):
        torch.ops.ikem_fast._add_partial_sums_(sums, parts)
        return
    sums.copy_(parts.sum(dim=1))


def _computed(values: Tensor) -> Tensor:
    return values.to(computed_dtype(values))


def _of_channels(values: Tensor) -> Tensor:
    """(S, C) to be broadcast over (S, B, T, V, C)."""
    return values[:, None, None, None]


def _project(slots: _Slots, h: Tensor, basis: Tensor, lead: int, plan: SpectralPlan) -> None:
    tiles = plan.tiles(h.shape[2])
    padded = torch.nn.functional.pad(h, (0, 0, 0, 0, lead, tiles * plan.tile_frames + lead - h.shape[2]))
    windows = padded.unfold(2, basis.shape[1], plan.tile_frames)  # (S, B, tiles, V, C, window)
    values = torch.einsum("nw,sbivcw->snbivc", basis.to(h), windows).flatten(2, 4)
    slots.single.copy_(values[:, 0])
    slots.pairs.copy_(values[:, 1:].unflatten(1, (-1, 2)).transpose(2, 3).flatten(3))


def _project_back(slots: _Slots, basis: Tensor, shape: torch.Size) -> Tensor:
    """Frames (S, B, T, V, C) of the computed dtype."""
    streams, sequences, num_frames, joints, channels = shape
    pairs = _computed(slots.pairs).unflatten(3, (2, channels)).transpose(2, 3).flatten(1, 2)
    values = torch.cat([_computed(slots.single).unsqueeze(1), pairs], dim=1)
    values = values.reshape(streams, basis.shape[0], sequences, -1, joints, channels)
    frames = torch.einsum("nt,snbivc->sbitvc", basis.to(values), values).flatten(2, 3)
    return frames[:, :, :num_frames]


if _extension.cuda_available():
    for _function in (temporal_convolution, temporal_convolution_backward):
        torch.library.impl(f"ikem_fast::{_function.__name__}", "cuda", _function)
    for _function, _name in ((spectral, ""), (spectral_backward, "_backward")):
        torch.library.impl(f"ikem_fast::_temporal_convolution_spectral{_name}", "cuda", _as_kernel(_function))
