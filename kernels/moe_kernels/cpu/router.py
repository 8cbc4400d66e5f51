"""Choosing experts in one pass over the logits each way; `router.cpp` has the passes and their cost. fp32.

Shapes: T tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import full_precision
from moe_kernels.cpu.linear import linear
from moe_kernels.cpu.operators import FLOATS, operator
from moe_kernels.reference import router as reference


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
    """(indices [T, K], weights [T, K], affinities [T, E])."""
    if score not in reference.SCORES or x_TD.dtype not in FLOATS or weight_ED.dtype not in FLOATS:
        how = (score, groups, top_groups, normalise, scale)
        return reference.route(x_TD, weight_ED, bias_E, chosen_TK, top_k, *how)
    with full_precision(x_TD.device):
        logits_TE = linear(x_TD.float(), weight_ED.float())
    bias = None if bias_E is None else bias_E.detach().float().contiguous()
    chosen = None if chosen_TK is None else chosen_TK.contiguous()
    how = (score == "sigmoid", groups, top_groups, normalise, scale)
    weights_TK, scores_TE, indices_TK = torch.ops.moe_kernels_cpu.route(
        logits_TE.contiguous(), bias, chosen, top_k, *how
    )
    return indices_TK, weights_TK, scores_TE


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, *_, sigmoid, _, _, normalise, scale = inputs
    _, scores, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(logits, indices, scores)
    ctx.numbers = sigmoid, normalise, scale


def _gradients(ctx: Any, d_weights: Tensor, d_scores: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = (d_weights.contiguous(), d_scores.contiguous())
    d_logits = torch.ops.moe_kernels_cpu.route_backward(*grads, *ctx.saved_tensors, *ctx.numbers)
    return d_logits, *[None] * 8


operator(
    "route(Tensor logits, Tensor? bias, Tensor? given, int choices, bool sigmoid, int groups, int top_groups,"
    " bool normalise, float scale) -> (Tensor, Tensor, Tensor)",
    lambda logits, bias, given, choices, *_: (
        logits.new_empty(len(logits), choices),
        torch.empty_like(logits),
        logits.new_empty(len(logits), choices, dtype=torch.int64),
    ),
    (_keep, _gradients),
)
operator(
    "route_backward(Tensor d_weights, Tensor d_scores, Tensor logits, Tensor indices, Tensor scores, bool sigmoid,"
    " bool normalise, float scale) -> Tensor",
    lambda d_weights, d_scores, logits, *_: torch.empty_like(logits),
)
