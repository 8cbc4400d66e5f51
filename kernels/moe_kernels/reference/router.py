"""Choosing experts: top-k of a score plus a bias that only selects; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

Shapes: T tokens, D hidden size, E experts, K experts per token, G groups of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.autocast import full_precision

SCORES = ("sigmoid", "sqrt_softplus")


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    chosen_TK: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [T, K], weights [T, K], affinities [T, E]). Raises `ValueError` for a score that does not exist."""
    scores_TE = affinities(logits(x_TD, weight_ED), score)
    indices_TK = chosen_TK
    if indices_TK is None:
        choice_TE = _within_best_groups(scores_TE.detach() + bias_E, groups, top_groups)
        indices_TK = choice_TE.topk(top_k, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, indices_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return indices_TK, weights_TK * scale, scores_TE


def logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """[T, E] fp32, whatever the autocast."""
    with full_precision(x_TD.device):
        return F.linear(x_TD.float(), weight_ED.float())


def affinities(logits_TE: Tensor, score: str) -> Tensor:
    """Of each token to each expert: their sigmoid, or the square root of their softplus."""
    if score not in SCORES:
        raise ValueError(f"the router has no score {score!r}; choose 'sigmoid' or 'sqrt_softplus'")
    return logits_TE.sigmoid() if score == "sigmoid" else F.softplus(logits_TE).sqrt()


def _within_best_groups(choice_TE: Tensor, groups: int, top_groups: int) -> Tensor:
    """Node-limited routing: a group scores by its two best experts; the experts of the other groups leave."""
    if groups == 1:
        return choice_TE
    choice_TGe = choice_TE.unflatten(-1, (groups, -1))
    best_Tg = choice_TGe.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
    outside_TG = torch.ones_like(choice_TGe[..., 0], dtype=torch.bool).scatter_(1, best_Tg, False)
    return choice_TGe.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(-2)
