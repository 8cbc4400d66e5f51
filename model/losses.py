"""What a training minimises: cross entropy of the next token and of the one after, balance, the indexer's distance.

Cross entropy never holds the full [tokens, vocabulary] matrix.
Shapes: B rows, S tokens, T = B * S, P of the T at a time, D hidden size, V vocabulary, M layers with experts,
E routed experts.
"""

from __future__ import annotations

from typing import Any

import moe_kernels
import torch
from torch import Tensor
from torch.nn import functional as F

from model.transformer import MoETransformer

IGNORED = -100  # a target that does not count
CHUNK = 2048  # tokens whose logits exist at the same time


def losses_of(
    net: MoETransformer, input_ids: Tensor, targets: Tensor, document_ids: Tensor, sparse: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(losses, statistics of the layers); input_ids, targets, document_ids are [B, S].

    Losses are fp32 scalars, means over what they count: `loss` and `mtp_loss` in nats a token, `balance_loss` (1: every
    expert alike) and `indexer_loss` (nats a query) over layers. What a model does not have is left out.
    """
    out = net(input_ids, document_ids, with_logits=False, with_mtp=True, sparse=sparse)
    losses = {"loss": cross_entropy(out.hidden.flatten(0, 1), net.lm_head.weight, targets.flatten())}
    if out.mtp_hidden is not None:
        later = later_targets(targets, document_ids).flatten()
        losses["mtp_loss"] = cross_entropy(out.mtp_hidden.flatten(0, 1), net.lm_head.weight, later)
    for name in ("balance_loss", "indexer_loss"):
        if name in out.statistics:
            losses[name] = out.statistics.pop(name).mean()
    return losses, {name: value.detach() for name, value in out.statistics.items()}


def later_targets(targets: Tensor, document_ids: Tensor) -> Tensor:
    """Targets one token further ahead, [B, S]: those of the next place, where it belongs to the same document."""
    same = document_ids[:, 1:] == document_ids[:, :-1]
    return F.pad(torch.where(same, targets[:, 1:], IGNORED), (0, 1), value=IGNORED)


def cross_entropy(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Mean of -log softmax(hidden @ head.T)[target], in nats, over the targets that are not `IGNORED`; fp32 scalar.

    The gradients are made chunk by chunk in the forward pass, so logits are computed once and never kept.
    """
    return _CrossEntropy.apply(hidden_TD, head_VD, targets_T)


def token_losses(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """-log softmax(hidden @ head.T)[target] of each token in nats, fp32 [T]; 0 where the target is `IGNORED`."""
    chunks = zip(hidden_TD.split(CHUNK), targets_T.split(CHUNK), strict=True)
    logits = ((moe_kernels.linear(part_PD, head_VD), target_P) for part_PD, target_P in chunks)
    return torch.cat([moe_kernels.cross_entropy(logits_PV, target_P, IGNORED) for logits_PV, target_P in logits])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        count = (targets_T != IGNORED).sum().clamp(min=1)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD, d_head_VD = torch.empty_like(hidden_TD), torch.zeros_like(head_VD, dtype=torch.float32)
        head_VD = head_VD.detach().requires_grad_()
        chunks = (x.split(CHUNK) for x in (hidden_TD, d_hidden_TD, targets_T))
        for part_PD, to_PD, target_P in zip(*chunks, strict=True):
            with torch.enable_grad():
                part_PD = part_PD.detach().requires_grad_()
                logits_PV = moe_kernels.linear(part_PD, head_VD)
            losses_P, d_logits_PV = moe_kernels.cross_entropy_with_gradient(
                logits_PV.detach(), target_P, 1 / count, IGNORED
            )
            loss += losses_P.sum()
            d_part_PD, d_part_VD = torch.autograd.grad(logits_PV, (part_PD, head_VD), d_logits_PV)
            to_PD.copy_(d_part_PD)
            d_head_VD += d_part_VD
        ctx.save_for_backward(d_hidden_TD, d_head_VD.to(head_VD.dtype))
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden_TD, d_head_VD = ctx.saved_tensors
        return d_hidden_TD * grad, d_head_VD * grad, None
