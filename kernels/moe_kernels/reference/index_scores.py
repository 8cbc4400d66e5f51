"""The lightning indexer's scores of compressed entries (DeepSeek-V3.2, arXiv 2512.02556, equation 1).

Shapes: B rows, S tokens, J indexer heads, I their channels, T entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e30  # the score of an entry that a query does not see
MATCHES = 1 << 26  # products of queries and keys that exist at the same time


def index_scores(q_BSJI: Tensor, weights_BSJ: Tensor, keys_BTI: Tensor, visible_BST: Tensor) -> Tensor:
    """sum_j w_j relu(q_j . k) where visible, else -1e30, [B, S, T] fp32."""
    rows, _, heads, _ = q_BSJI.shape
    part = max(1, MATCHES // max(1, rows * heads * keys_BTI.shape[1]))
    pairs = zip(q_BSJI.split(part, dim=1), weights_BSJ.split(part, dim=1), strict=True)
    scores_BST = torch.cat([_weighted(q, w, keys_BTI) for q, w in pairs], dim=1)
    return scores_BST.masked_fill(~visible_BST, HIDDEN)


def _weighted(q_BSJI: Tensor, weights_BSJ: Tensor, keys_BTI: Tensor) -> Tensor:
    match_BXT = torch.bmm(q_BSJI.flatten(1, 2), keys_BTI.mT).relu().to(weights_BSJ.dtype)
    match_XJT = match_BXT.unflatten(1, weights_BSJ.shape[1:]).flatten(0, 1)
    scores_X1T = torch.bmm(weights_BSJ.flatten(0, 1).unsqueeze(1), match_XJT)
    return scores_X1T.view(*q_BSJI.shape[:2], keys_BTI.shape[1])
