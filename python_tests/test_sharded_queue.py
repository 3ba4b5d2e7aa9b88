"""Queues spread over 2 and 4 gloo processes against whole ones; what is checked stands in sharded_queue_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_processes
import torch

from ikem_fast import ops

FILE = Path(__file__).with_name("sharded_queue_ranks.py")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def errors(request, tmp_path_factory):
    return rank_processes.run(FILE, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", rank_processes.names(FILE))
def test_on_several_ranks(errors, name):
    assert not errors[name], "\n".join(errors[name])


def test_without_a_group():
    queue = torch.randn(2, 3, 7)
    assert ops.queue_columns(7, None) == slice(0, 7)
    for whole in (ops.own_columns(queue, None), ops.gather_queue(queue, None)):
        assert torch.equal(whole, queue)
        assert whole.data_ptr() != queue.data_ptr()
