"""Training steps on 2 and 4 gloo processes; what is checked stands in shared_step_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_processes
import shared_step_4_ranks
import shared_step_ranks
import torch
from torch import distributed

FILES = {2: "shared_step_ranks.py", 4: "shared_step_4_ranks.py"}
NAMES = {
    2: rank_processes.names(Path(__file__).with_name(FILES[2])),
    4: [check.__name__.removeprefix("check_") for check in shared_step_4_ranks.CHECKS],
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Of every number of ranks."""
    folder = Path(__file__).parent
    return {size: rank_processes.run(folder / FILES[size], size, tmp_path_factory.mktemp("ranks")) for size in FILES}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in NAMES.items() for name in names])
def test_on_several_ranks(errors, size, name):
    assert not errors[size][name], "\n".join(errors[size][name])


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
