"""Encoders."""

from ikem_fast.nn.stgcn import STGCN, EncoderInput, initialize_weights

__all__ = ["STGCN", "EncoderInput", "initialize_weights"]
