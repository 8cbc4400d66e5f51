"""Next-token cross entropy without the full [tokens, vocabulary] matrix.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target that does not count
CHUNK = 2048  # tokens whose logits exist at the same time


def cross_entropy(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Mean of -log softmax(hidden @ head.T)[target], in nats, over the targets that are not `IGNORED`; fp32 scalar.

    The gradients are made chunk by chunk in the forward pass, so logits are computed once and never kept.
    """
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD, head_VD = hidden_TD.to(dtype), head_VD.to(dtype)
    return _CrossEntropy.apply(hidden_TD, head_VD, targets_T)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        count = (targets_T != IGNORED).sum().clamp(min=1)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD)
        d_head_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        for rows in torch.arange(len(targets_T)).split(CHUNK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            log_p = F.log_softmax(torch.mm(hidden_TD[part], head_VD.t()).float(), dim=-1)
            kept = targets_T[part] != IGNORED
            target = targets_T[part].clamp(min=0).unsqueeze(1)
            loss -= (log_p.gather(1, target).squeeze(1) * kept).sum()
            d_logits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
            d_logits = d_logits.mul_((kept / count).unsqueeze(1)).to(hidden_TD.dtype)
            torch.mm(d_logits, head_VD, out=d_hidden_TD[part])
            d_head_VD += torch.mm(d_logits.t(), hidden_TD[part])
        ctx.save_for_backward(d_hidden_TD, d_head_VD.to(head_VD.dtype))
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden_TD, d_head_VD = ctx.saved_tensors
        return d_hidden_TD * grad, d_head_VD * grad, None
