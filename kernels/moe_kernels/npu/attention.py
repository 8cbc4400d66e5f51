"""Causal attention in one operator, with its own backward pass.

Without documents the operator makes the causal mask itself from a compressed one of 2048 by 2048; with documents it
gets the whole mask. True means hidden, the opposite of PyTorch's masks.

Shapes: B batch, S queries, T keys, H heads, D query and key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.reference.attention import hidden

NEEDS = {"npu_fusion_attention": ("head_num", "input_layout", "atten_mask", "scale", "sparse_mode")}
COMPRESSED = 2048
GIVEN_MASK, CAUSAL_FROM_THE_END = 1, 3  # sparse_mode


def attention(
    q_BSHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float, document_ids_BT: Tensor | None = None
) -> Tensor:
    """[B, S, H, V]."""
    if document_ids_BT is None:
        ones = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=q_BSHD.device)
        mask, mode = ones.triu(1), CAUSAL_FROM_THE_END
    else:
        mask, mode = hidden(q_BSHD.shape[1], k_BTHD, document_ids_BT), GIVEN_MASK
    return torch.ops.npu.npu_fusion_attention(
        q_BSHD, k_BTHD, v_BTHV, q_BSHD.shape[2], "BSND", atten_mask=mask, scale=scale, sparse_mode=mode
    )[0]
