"""What the machine can do at best: bytes copied and arithmetic operations of products per second, measured now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPIED = {"cpu": 2**26, "cuda": 2**28}  # float32 values: 256 MiB and 1 GiB, far beyond any cache
PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns of factors
ROUNDS, WARM_UP = 5, 2


@dataclass(frozen=True)
class Ceilings:
    """Of one device; bytes read and bytes written both count."""

    copy_bytes_per_second: float
    fp32_operations_per_second: float
    bf16_operations_per_second: float

    def operations_per_second(self, kind: str) -> float:
        return {"fp32": self.fp32_operations_per_second, "bf16": self.bf16_operations_per_second}[kind]


@torch.no_grad()
def measure(device: str | torch.device) -> Ceilings:
    """Measures with as many threads as torch has now."""
    device = torch.device(device)
    return Ceilings(_copies(device), _products(device, torch.float32), _products(device, torch.bfloat16))


def _copies(device: torch.device) -> float:
    source = torch.ones(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """By the fastest of the library's matrix product and, on a CPU, its convolutions, which are at times far ahead."""
    size = PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = [2 * size**3 / _least_seconds(lambda: torch.mm(a, b), device)]
    if device.type == "cpu":
        # As the encoder's last block has it: (B, C, T, V) in channels last, and 9 taps over frames.
        batch, channels, frames, joints = 16, 256, 13, 25
        x = torch.randn(batch, channels, frames, joints).to(dtype).to(memory_format=torch.channels_last)
        for taps in (1, 9):
            weight = torch.randn(channels, channels, taps, 1).to(dtype).to(memory_format=torch.channels_last)
            # Without padding: every tap of every frame is a product.
            seconds = _least_seconds(lambda weight=weight: torch.conv2d(x, weight), device)
            rates.append(2 * batch * (frames - taps + 1) * joints * taps * channels**2 / seconds)
    return max(rates)


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        wait_for(device)
        begin = time.perf_counter()
        call()
        wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[WARM_UP:])  # what else the machine does makes it no slower a machine


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
