"""A linear layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x weight^T over the last axis, in the dtype of autocast where that is on, else of `x`."""
    return F.linear(x, weight_OD)
