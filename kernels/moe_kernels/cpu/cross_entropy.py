"""Cross entropy and its gradient in one pass over the logits; `cross_entropy.cpp` has it and its cost. fp32 inside.

Shapes: T tokens, V vocabulary. Losses alone are the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, operator
from moe_kernels.reference import cross_entropy as reference
from moe_kernels.reference.cross_entropy import cross_entropy

__all__ = ["cross_entropy", "cross_entropy_with_gradient"]


def cross_entropy_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """(-log softmax(logits)[target] [T] fp32, `scale` times the gradient of their sum [T, V])."""
    if logits_TV.dtype not in FLOATS or scale.dtype is not torch.float32:
        return reference.cross_entropy_with_gradient(logits_TV, targets_T, scale, ignored)
    tensors = (tensor.detach().contiguous() for tensor in (logits_TV, targets_T, scale))
    return torch.ops.moe_kernels_cpu.cross_entropy_with_gradient(*tensors, ignored)


operator(
    "cross_entropy_with_gradient(Tensor logits, Tensor targets, Tensor scale, int ignored) -> (Tensor, Tensor)",
    lambda logits, targets, scale, ignored: (scale.new_empty(logits.shape[0]), torch.empty_like(logits)),
)
