"""Causal attention within documents, arXiv 1706.03762, equation 1.

Shapes: B batch, S queries, T keys, H heads, D query and key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    q_BSHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float, document_ids_BT: Tensor | None = None
) -> Tensor:
    """[B, S, H, V]."""
    causal = document_ids_BT is None and q_BSHD.shape[1] == k_BTHD.shape[1]
    seen = None if causal else ~hidden(q_BSHD.shape[1], k_BTHD, document_ids_BT)
    return masked_attention(q_BSHD, k_BTHD, v_BTHV, scale, seen, causal)


def masked_attention(
    q_BSHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """[B, S, H, V], with a mask as PyTorch takes it. Values are padded to D channels: fused CPU kernels need one head
    size."""
    width = v_BTHV.shape[-1]
    v_BTHD = F.pad(v_BTHV, (0, q_BSHD.shape[-1] - width))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BSHD, k_BTHD, v_BTHD))
    out_BHSD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out_BHSD.transpose(1, 2)[..., :width]


def hidden(queries: int, k_BTHD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """True where a query must not see a key: later keys and other documents; [B or 1, 1, S, T]."""
    keys = k_BTHD.shape[1]
    places_T = torch.arange(keys, device=k_BTHD.device)
    hidden_BST = (places_T > places_T[keys - queries :, None])[None]
    if document_ids_BT is not None:
        hidden_BST = hidden_BST | (document_ids_BT[:, keys - queries :, None] != document_ids_BT[:, None, :])
    return hidden_BST.unsqueeze(1)
