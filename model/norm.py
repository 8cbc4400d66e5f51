"""Root-mean-square normalisation, arXiv 1910.07467, equation 4: fp32 inside, the input's dtype outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """The same without a weight."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
