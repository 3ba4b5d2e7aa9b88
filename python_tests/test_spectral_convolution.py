"""The spectral form of a convolution over frames against PyTorch's convolution."""

import pytest
import torch

from ikem_fast.ops._spectral_convolution import spectral_convolution, spectral_matrices


def convolution(h, weight):
    streams = [
        torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), w.unsqueeze(3), padding=(w.shape[2] // 2, 0))
        for x, w in zip(h, weight, strict=True)
    ]
    return torch.stack(streams).permute(0, 1, 3, 4, 2)


LENGTHS = [(1, None), (2, None), (4, None), (13, None), (25, None), (25, 9), (13, 1), (38, 13), (75, 25), (7, 4)]


@pytest.mark.parametrize(("num_frames", "tile"), LENGTHS)
@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_equals_convolution(num_frames, tile, kernel_size):
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(2, 3, num_frames, 2, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(2, 4, 5, kernel_size, dtype=torch.float64, generator=generator).requires_grad_()
    ours, expected = spectral_convolution(h, weight, tile=tile), convolution(h, weight)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for one, other in zip(
        torch.autograd.grad(ours, (h, weight), upstream),
        torch.autograd.grad(expected, (h, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_number_of_products():
    signal, weight, result = spectral_matrices(13, 9)
    assert signal.shape == (25, 13)
    assert weight.shape == (25, 9)
    assert result.shape == (13, 25)
    assert spectral_matrices(25, 9).weight.shape == (43, 9)
    assert spectral_matrices(26, 9, tile=13).signal.shape == (31, 21)
    assert all(matrix.abs().max() < 1.5 for matrix in spectral_matrices(13, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_grows_little(dtype):
    """Both forms of the 256-channel convolution with factors of this dtype, against the exact one."""
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(1, 2, 13, 3, 256, dtype=torch.float64, generator=generator).relu()
    weight = 0.02 * torch.randn(1, 256, 256, 9, dtype=torch.float64, generator=generator)
    exact = convolution(h, weight)

    def rounded(values):
        return values.to(dtype).double()

    signal, taps, result = spectral_matrices(13, 9)
    of_signal = rounded(torch.einsum("pt,sbtvi->spbvi", signal, h))
    of_weight = rounded(torch.einsum("pk,soik->spio", taps, weight))
    spectral = torch.einsum("tp,spbvi,spio->sbtvo", result, of_signal, of_weight)
    direct = convolution(rounded(h), rounded(weight))

    def deviation(values):
        return (values - exact).square().mean().sqrt()

    assert deviation(spectral) < 1.5 * deviation(direct)


@pytest.mark.parametrize("sizes", [(0, 9), (13, 8), (13, 0)])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match="num_frames and kernel_size must be at least 1 and kernel_size odd, got"):
        spectral_matrices(*sizes)
