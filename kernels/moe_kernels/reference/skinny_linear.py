"""A linear layer on a few rows; a row's result does not depend on how many there are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def skinny_linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x weight^T, [T, O]: products of a multiple of four rows, as fewer go through other code of a BLAS."""
    rows = len(x_TD)
    return F.linear(F.pad(x_TD, (0, 0, 0, -rows % 4)), weight_OD)[:rows]
