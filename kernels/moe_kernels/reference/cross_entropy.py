"""Cross entropy of next tokens, one value per token. Shapes: T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignored: int = -100) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32 [T]; 0 where the target is `ignored`."""
    return F.cross_entropy(logits_TV.float(), targets_T, ignore_index=ignored, reduction="none")


def cross_entropy_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """(-log softmax(logits)[target] [T] fp32, `scale` times the gradient of their sum [T, V])."""
    log_p_TV = F.log_softmax(logits_TV.detach().float(), dim=-1)
    kept_T1 = (targets_T != ignored).unsqueeze(1)
    target_T1 = targets_T.clamp(min=0).unsqueeze(1)
    losses_T1 = -log_p_TV.gather(1, target_T1) * kept_T1
    gradient_TV = log_p_TV.exp_().scatter_add_(1, target_T1, torch.full_like(losses_T1, -1.0))
    return losses_T1.squeeze(1), gradient_TV.mul_(kept_T1 * scale).to(logits_TV.dtype)
