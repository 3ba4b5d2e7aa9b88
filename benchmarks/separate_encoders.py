"""What a user has without this package: one eager encoder per modality, behind the multi-stream encoder's interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ikem_fast.methods import IKEM
from ikem_fast.nn import EncoderInput, MultiStreamSTGCN, STGCNReference


class _Heads(nn.Module):
    def __init__(self, heads: list[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)])


class SeparateEncoders(nn.Module):
    """S encoders in plain PyTorch, with the weights of a multi-stream encoder."""

    def __init__(self, encoders: MultiStreamSTGCN, *, compiled: bool = False, autocast: bool = False):
        super().__init__()
        self.encoders = nn.ModuleList(encoders.to_reference(stream) for stream in range(encoders.num_streams))
        self.head = _Heads([encoder.head for encoder in self.encoders])
        self._features = torch.compile(STGCNReference.features) if compiled else STGCNReference.features
        self._autocast = autocast

    def features(self, x: EncoderInput) -> Tensor:
        known = x.mean is not None and x.variance is not None
        moments = (zip(x.mean, x.variance, strict=True)) if known else [(None, None)] * len(x.values)
        with torch.autocast(x.values.device.type, torch.bfloat16, enabled=self._autocast):
            features = [
                self._features(encoder, EncoderInput(values, x.num_persons, mean, variance))
                for encoder, values, (mean, variance) in zip(self.encoders, x.values, moments, strict=True)
            ]
        return torch.stack(features).float()

    def forward(self, x: EncoderInput) -> Tensor:
        return self.head(self.features(x))


def separate(module: IKEM, **arguments: bool) -> None:
    """Puts separate encoders with the same weights in the place of a trainer's own."""
    module.query_encoders = SeparateEncoders(module.query_encoders, **arguments)
    module.key_encoders = SeparateEncoders(module.key_encoders, **arguments).requires_grad_(False)
