"""Sorting tokens by expert and bringing them back, one operator each way.

Shapes: T tokens, D hidden size, E experts, K experts per token, N = T * K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS = {"npu_moe_token_permute": ("tokens", "indices"), "npu_moe_token_unpermute": ("sorted_indices", "probs")}


def permute(x_TD: Tensor, indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [N, D], place [T, K] int32 of each choice, rows of each expert [E] int64)."""
    rows_ND, places_N = torch.ops.npu.npu_moe_token_permute(x_TD, indices_TK.to(torch.int32))
    return rows_ND, places_N.view_as(indices_TK), expert_load(indices_TK, num_experts)


def expert_load(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Rows that each expert gets, [E] int64, from a histogram: its length does not depend on the data."""
    counts_E = torch.histc(indices_TK.float(), bins=num_experts, min=0, max=num_experts - 1)
    return counts_E.to(torch.int64)


def unpermute(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's rows."""
    return torch.ops.npu.npu_moe_token_unpermute(y_ND, places_TK.flatten(), probs=weights_TK.to(y_ND.dtype))
