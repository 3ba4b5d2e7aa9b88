"""A convolution over frames by few products: the matrices of its spectral form, and the form itself in plain PyTorch.

A convolution of channels over T frames with K taps takes nearly T·K products of (rows, C_in) with (C_in, C_out). A
discrete Fourier transform of N frames takes one product for each frequency instead. As all numbers are real, half of
the frequencies are enough, and a complex product of a + ib and c + id takes three real ones, ac, bd and (a + b)(c + d).
So 1 + 3 (N - 1) / 2 products are left, for T = 13 and K = 9 (N = 17) 25 instead of 97, between three real matrices:

    y = result [ (weight w) o (signal h) ]

The matrices' numbers are cosines, sines and their sums, so that rounding grows little on the way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SpectralMatrices(NamedTuple):
    """The three matrices of one tile, float64; P is the number of products.

    Attributes:
        signal: (P, W), from the W frames that a tile reads. Where sequences are one tile, W is its number of frames and
            the zeros around it are implied; otherwise W = tile + K - 1.
        weight: (P, K), from the taps.
        result: (tile, P), to the frames of the convolution.
    """

    signal: Tensor
    weight: Tensor
    result: Tensor


def spectral_matrices(num_frames: int, kernel_size: int, *, tile: int | None = None) -> SpectralMatrices:
    """The matrices of a convolution (with zeros around, frame t of the result under the middle tap).

    The backward pass needs no others: the gradient of h is ``signal.T [(weight w) o (result.T gradient)]``, that of w
    is ``weight.T [(signal h) o (result.T gradient)]``, summed over everything but channels.

    Args:
        num_frames: T of the sequences.
        kernel_size: K, odd.
        tile: frames of a tile of the result, fewer than ``num_frames``; by default a sequence is one tile.
    """
    if num_frames < 1 or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"num_frames and kernel_size must be at least 1 and kernel_size odd, got {num_frames} and {kernel_size}"
        )
    if tile is None or tile >= num_frames:
        tile = window = num_frames
        at_least = num_frames + kernel_size // 2  # what goes round the end of the circle meets zeros
    else:
        window = at_least = tile + kernel_size - 1
    length = at_least // 2 * 2 + 1
    # The convolution's taps come in the other order: y_t = sum over k of w_k h_(t + k - K // 2).
    taps = _evaluation(kernel_size, length).flip(1)
    return SpectralMatrices(_evaluation(window, length), taps, _interpolation(tile, length))


def spectral_convolution(h: Tensor, weight: Tensor, *, tile: int | None = None) -> Tensor:
    """The convolution of every stream, in the dtype of its arguments.

    Args:
        h: (S, B, T, V, C_in).
        weight: (S, C_out, C_in, K).
        tile: as for ``spectral_matrices``.

    Returns:
        (S, B, T, V, C_out).
    """
    num_frames, kernel_size = h.shape[2], weight.shape[3]
    signal, taps, result = (matrix.to(h) for matrix in spectral_matrices(num_frames, kernel_size, tile=tile))
    tiles = _tiles(h, signal.shape[1], result.shape[0])
    of_signal = torch.einsum("pw,sbnwvi->spbnvi", signal, tiles)
    of_weight = torch.einsum("pk,soik->spio", taps, weight)
    products = torch.einsum("spbnvi,spio->spbnvo", of_signal, of_weight)
    return torch.einsum("tp,spbnvo->sbntvo", result, products).flatten(2, 3)[:, :, :num_frames]


def _tiles(h: Tensor, window: int, tile: int) -> Tensor:
    """(S, B, number of tiles, window, V, C_in), with zeros before and after the sequences."""
    around = (window - tile) // 2
    num_tiles = max(-(-h.shape[2] // tile), 1)
    padded = torch.nn.functional.pad(h, (0, 0, 0, 0, around, num_tiles * tile + around - h.shape[2]))
    return padded.unfold(2, window, tile).movedim(-1, 3)


def _angles(num_points: int, length: int) -> Tensor:
    """(N - 1) / 2 frequencies x points, of points that lie around the circle's zero."""
    points = torch.arange(num_points, dtype=torch.float64) - (num_points - 1) / 2
    frequencies = torch.arange(1, (length - 1) // 2 + 1, dtype=torch.float64)
    return 2 * math.pi / length * torch.outer(frequencies, points)


def _evaluation(num_points: int, length: int) -> Tensor:
    """(P, points): the sum, then for each frequency real part, imaginary part (negated) and both added."""
    angles = _angles(num_points, length)
    real, imaginary = angles.cos(), angles.sin()
    of_frequencies = torch.stack([real, imaginary, real + imaginary], dim=1).flatten(0, 1)
    return torch.cat([real.new_ones(1, num_points), of_frequencies])


def _interpolation(num_points: int, length: int) -> Tensor:
    """(points, P): the values of which the products ac, bd and (a + b)(c + d) are the spectrum."""
    angles = _angles(num_points, length)
    real, imaginary = angles.cos(), angles.sin()
    # Re = ac - bd and (negated) Im = (a + b)(c + d) - ac - bd.
    of_frequencies = 2 * torch.stack([real - imaginary, -real - imaginary, imaginary], dim=1).flatten(0, 1)
    return torch.cat([real.new_ones(1, num_points), of_frequencies]).t() / length
