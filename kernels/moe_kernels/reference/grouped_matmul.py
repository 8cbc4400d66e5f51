"""One matrix product per expert over rows that are sorted by expert.

Shapes: N rows, D inputs, F outputs, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """x @ weight[e]^T for the rows of each expert; reads the counts on the host."""
    parts = x_ND.split(counts_E.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EFD.unbind(), strict=True)])
