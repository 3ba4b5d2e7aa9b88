"""Encoders."""

from ikem_fast.nn.layers import StackedLinear, stacked_head
from ikem_fast.nn.parts import EncoderInput, initialize_weights
from ikem_fast.nn.stgcn import STGCN, MultiStreamSTGCN
from ikem_fast.nn.stgcn_reference import STGCNReference

__all__ = [
    "STGCN",
    "EncoderInput",
    "MultiStreamSTGCN",
    "STGCNReference",
    "StackedLinear",
    "initialize_weights",
    "stacked_head",
]
