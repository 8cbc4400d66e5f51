"""Choosing experts: top-k of a score plus a bias that only selects; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

Shapes: T tokens, D hidden size, E experts, K experts per token, G groups of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(indices [T, K], weights [T, K] fp32). Raises `ValueError` for a score that does not exist."""
    scores_TE = affinities(x_TD, weight_ED, score)
    choice_TE = _within_best_groups(scores_TE.detach() + bias_E, groups, top_groups)
    indices_TK = choice_TE.topk(top_k, dim=-1, sorted=False).indices
    return indices_TK, mixing(scores_TE.gather(1, indices_TK), normalise, scale)


def affinities(x_TD: Tensor, weight_ED: Tensor, score: str) -> Tensor:
    """Of each token to each expert, [T, E] fp32, whatever the autocast."""
    if score not in ("sigmoid", "sqrt_softplus"):
        raise ValueError(f"the router has no score {score!r}; choose 'sigmoid' or 'sqrt_softplus'")
    with torch.autocast(x_TD.device.type, enabled=False):
        logits_TE = F.linear(x_TD.float(), weight_ED.float())
    return logits_TE.sigmoid() if score == "sigmoid" else F.softplus(logits_TE).sqrt()


def mixing(weights_TK: Tensor, normalise: bool, scale: float) -> Tensor:
    """Weights of the chosen experts from their affinities."""
    return (weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20) if normalise else weights_TK) * scale


def _within_best_groups(choice_TE: Tensor, groups: int, top_groups: int) -> Tensor:
    """Node-limited routing: a group scores by its two best experts; the experts of the other groups leave."""
    if groups == 1:
        return choice_TE
    choice_TGe = choice_TE.unflatten(-1, (groups, -1))
    best_Tg = choice_TGe.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
    outside_TG = torch.ones_like(choice_TGe[..., 0], dtype=torch.bool).scatter_(1, best_Tg, False)
    return choice_TGe.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(-2)
