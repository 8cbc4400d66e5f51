"""Cross entropy of next tokens in one operator each way. Shapes: T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS = {
    "npu_cross_entropy_loss": ("input", "target", "reduction", "ignore_index"),
    "npu_cross_entropy_loss_backward": ("grad_loss", "log_prob", "target", "reduction", "ignore_index"),
}


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignored: int = -100) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32 [T]; 0 where the target is `ignored`."""
    return _loss(logits_TV, targets_T, ignored)[0]


@torch.no_grad()
def cross_entropy_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """(-log softmax(logits)[target] [T] fp32, `scale` times the gradient of their sum [T, V])."""
    losses_T, log_p_TV = _loss(logits_TV, targets_T, ignored)[:2]
    gradient_TV = torch.ops.npu.npu_cross_entropy_loss_backward(
        scale.float().expand_as(losses_T).contiguous(), log_p_TV, targets_T, reduction="none", ignore_index=ignored
    )
    return losses_T, gradient_TV.to(logits_TV.dtype)


def _loss(logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, ...]:
    return torch.ops.npu.npu_cross_entropy_loss(logits_TV.float(), targets_T, reduction="none", ignore_index=ignored)
