"""Encoders."""

from ikem_fast.nn.stgcn import STGCN, initialize_weights

__all__ = ["STGCN", "initialize_weights"]
