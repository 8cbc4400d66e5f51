"""Cross entropy in one pass over the logits, with its gradient where wanted; `cross_entropy.cpp` has it and its cost.

fp32 inside. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, operator
from moe_kernels.reference import cross_entropy as reference


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignored: int = -100) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32 [T]; 0 where the target is `ignored`."""
    if logits_TV.dtype not in FLOATS:
        return reference.cross_entropy(logits_TV, targets_T, ignored)
    return torch.ops.moe_kernels_cpu.cross_entropy(logits_TV.contiguous(), targets_T.contiguous(), ignored)


def cross_entropy_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """(-log softmax(logits)[target] [T] fp32, `scale` times the gradient of their sum [T, V])."""
    if logits_TV.dtype not in FLOATS or scale.dtype is not torch.float32:
        return reference.cross_entropy_with_gradient(logits_TV, targets_T, scale, ignored)
    tensors = (tensor.detach().contiguous() for tensor in (logits_TV, targets_T, scale))
    return torch.ops.moe_kernels_cpu.cross_entropy_with_gradient(*tensors, ignored)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits_TV, targets_T, ctx.ignored = inputs
    ctx.save_for_backward(logits_TV, targets_T)


def _gradient(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
    logits_TV, targets_T = ctx.saved_tensors
    one = torch.ones((), device=grad_T.device)
    _, slopes_TV = torch.ops.moe_kernels_cpu.cross_entropy_with_gradient(logits_TV, targets_T, one, ctx.ignored)
    return slopes_TV * grad_T.unsqueeze(1).to(slopes_TV.dtype), None, None


operator(
    "cross_entropy(Tensor logits, Tensor targets, int ignored) -> Tensor",
    lambda logits, targets, ignored: logits.new_empty(logits.shape[0], dtype=torch.float32),
    (_keep, _gradient),
)
operator(
    "cross_entropy_with_gradient(Tensor logits, Tensor targets, Tensor scale, int ignored) -> (Tensor, Tensor)",
    lambda logits, targets, scale, ignored: (scale.new_empty(logits.shape[0]), torch.empty_like(logits)),
)
