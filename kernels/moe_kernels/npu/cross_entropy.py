"""Cross entropy of next tokens in one operator, with its own backward pass. Shapes: T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.reference.cross_entropy import cross_entropy_with_gradient

__all__ = ["cross_entropy", "cross_entropy_with_gradient"]
NEEDS = {"npu_cross_entropy_loss": ("input", "target", "reduction", "ignore_index")}


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignored: int = -100) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32 [T]; 0 where the target is `ignored`."""
    outputs = torch.ops.npu.npu_cross_entropy_loss(logits_TV.float(), targets_T, reduction="none", ignore_index=ignored)
    return outputs[0]
