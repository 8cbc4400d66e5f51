"""Root-mean-square normalisation, arXiv 1910.07467, equation 4: fp32 inside, the input's dtype outside."""

from __future__ import annotations

import torch
from moe_kernels import rms_norm
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
