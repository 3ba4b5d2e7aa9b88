import pytest
import torch

from ikem_fast import ops


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999, 1.0])
def test_equals_the_formula(m):
    shapes = [(3, 4), (5,), ()]
    keys, queries = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    expected = [m * key + (1 - m) * query for key, query in zip(keys, queries, strict=True)]
    ops.momentum_update_(keys, queries, m)
    for key, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(key, wanted)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"m must be in \[0, 1\], got 1.5"):
        ops.momentum_update_([], [], 1.5)
    with pytest.raises(ValueError, match="query_params must be 1 tensors as key_params is, got 0"):
        ops.momentum_update_([torch.zeros(2)], [], 0.9)
    with pytest.raises(ValueError, match=r"query_params\[0\] must be \(2,\) float32 as key_params is, got \(1,\)"):
        ops.momentum_update_([torch.zeros(2)], [torch.zeros(1)], 0.9)
