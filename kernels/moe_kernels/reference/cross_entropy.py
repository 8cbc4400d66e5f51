"""Cross entropy of next tokens, one value per token. Shapes: T tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignored: int = -100) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32 [T]; 0 where the target is `ignored`."""
    return F.cross_entropy(logits_TV.float(), targets_T, ignore_index=ignored, reduction="none")
