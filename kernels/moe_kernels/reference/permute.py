"""Sorting tokens by expert, and bringing the experts' rows back to their tokens.

Shapes: T tokens, D hidden size, E experts, K experts per token, N = T * K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x_TD: Tensor, indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [N, D], place [T, K] of each choice, rows of each expert [E]); equal experts keep the order of tokens."""
    order_N = indices_TK.flatten().argsort(stable=True)
    rows_N = torch.arange(len(order_N), device=order_N.device)
    places_TK = torch.empty_like(order_N).scatter_(0, order_N, rows_N).view_as(indices_TK)
    rows_ND = x_TD.index_select(0, order_N // indices_TK.shape[1])
    return rows_ND, places_TK, expert_load(indices_TK, num_experts)


def expert_load(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Rows that each expert gets, [E] int64."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=indices_TK.device)
    return counts_E.scatter_add_(0, indices_TK.flatten(), torch.ones_like(indices_TK).flatten())


def unpermute(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's rows, accumulated in fp32."""
    rows_TKD = y_ND.index_select(0, places_TK.flatten()).unflatten(0, places_TK.shape)
    return (rows_TKD.float() * weights_TK.float().unsqueeze(-1)).sum(dim=1).to(y_ND.dtype)
