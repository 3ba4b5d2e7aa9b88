"""Training steps on 2 and 4 gloo processes; what is checked stands in shared_step_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_processes
import shared_step_ranks
import torch
from torch import distributed

FILE = Path(__file__).with_name("shared_step_ranks.py")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def errors(request, tmp_path_factory):
    return rank_processes.run(FILE, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", rank_processes.names(FILE))
def test_on_several_ranks(errors, name):
    assert not errors[name], "\n".join(errors[name])


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("batch_statistics", ["synchronised", "per_rank"])
def test_gpu_steps_through_nccl_equal_those_without(tmp_path, batch_statistics):
    """With the one rank that a single GPU has room for."""
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        expected, ours = (shared_step_ranks.ikem().float().cuda() for _ in range(2))
        shared = shared_step_ranks.shared_steps(distributed.group.WORLD, batch_statistics)
        for one, other in zip(shared_step_ranks.train(ours, shared), shared_step_ranks.train(expected), strict=True):
            assert one.names == other.names
            torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-4)
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-2, atol=1e-3)
    finally:
        shared_step_ranks.step_groups.cache_clear()
        distributed.destroy_process_group()
