"""DeepSeek-V4's core attention in one operator, with its own backward pass: window, entries and sink share its softmax.

Each chunk of W queries is a row of its own whose keys are its 2 W tokens and all entries; the one key head serves all
query heads and is the value too. The operator hands out the maximum and the sum of each softmax, from which one more
product gives the attention that the entries got.

Shapes: B rows, S queries, K keys, H heads, D channels, T entries, W tokens of the window, C = B * ceil(S / W) chunks,
A = 2 W + T keys of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.npu.attention import GIVEN_MASK, NEEDS
from moe_kernels.reference.window_attention import chunks

__all__ = ["NEEDS", "cached_window_attention", "window_attention"]


def window_attention(
    q_BSHD: Tensor, kv_BSD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, window_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], probability of each entry summed over heads [B, S, T], detached)."""
    rows, length = q_BSHD.shape[:2]
    q_BSHD, kv_BSD, entries_BTD = in_autocast_dtype(q_BSHD, kv_BSD, entries_BTD)
    window = window_BSK.shape[-1] // 2
    short, count = -length % window, -(-length // window)
    q_CWHD = F.pad(q_BSHD, (0, 0, 0, 0, 0, short)).unflatten(1, (count, window)).flatten(0, 1)
    far_CTD = entries_BTD.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 1)
    keys_CAD = torch.cat([chunks(kv_BSD, window), far_CTD], dim=1)
    seen_BSA = torch.cat([window_BSK.expand(rows, -1, -1), visible_BST], dim=-1)
    seen_CWA = F.pad(seen_BSA, (0, 0, 0, short), value=True).unflatten(1, (count, window)).flatten(0, 1)
    out_CWHD, top_CWH, total_CWH = _attend(q_CWHD, keys_CAD, seen_CWA, sinks_H)
    out, *statistics = (x.unflatten(0, (rows, count)).flatten(1, 2)[:, :length] for x in (out_CWHD, top_CWH, total_CWH))
    return out, _mass(q_BSHD, entries_BTD, visible_BST, *statistics)


def cached_window_attention(
    q_BSHD: Tensor, kv_BKD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, allowed_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """The same over any keys, with what each query may see of them [B, S, K]."""
    q_BSHD, kv_BKD, entries_BTD = in_autocast_dtype(q_BSHD, kv_BKD, entries_BTD)
    keys_BAD, seen_BSA = torch.cat([kv_BKD, entries_BTD], dim=1), torch.cat([allowed_BSK, visible_BST], dim=-1)
    out_BSHD, *statistics = _attend(q_BSHD, keys_BAD, seen_BSA, sinks_H)
    return out_BSHD, _mass(q_BSHD, entries_BTD, visible_BST, *statistics)


def _attend(q_CWHD: Tensor, keys_CAD: Tensor, seen_CWA: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out [C, W, H, D], maximum and sum of each softmax [C, W, H])."""
    heads, width = q_CWHD.shape[2:]
    keys_CA1D = keys_CAD.unsqueeze(2)
    out, top_CHW8, total_CHW8 = torch.ops.npu.npu_fusion_attention(
        q_CWHD, keys_CA1D, keys_CA1D, heads, "BSND", atten_mask=~seen_CWA.unsqueeze(1), scale=width**-0.5,
        sparse_mode=GIVEN_MASK, sink=sinks_H.float(),
    )[:3]  # fmt: skip
    return out, top_CHW8[..., 0].transpose(1, 2), total_CHW8[..., 0].transpose(1, 2)


@torch.no_grad()
def _mass(q_BSHD: Tensor, entries_BTD: Tensor, visible_BST: Tensor, top_BSH: Tensor, total_BSH: Tensor) -> Tensor:
    """Probability of each entry, summed over heads, [B, S, T] fp32."""
    heads, width = q_BSHD.shape[2:]
    logits_BXT = torch.bmm(q_BSHD.flatten(1, 2), entries_BTD.mT).float() * width**-0.5
    p_BSHT = (logits_BXT.unflatten(1, (-1, heads)) - top_BSH.unsqueeze(-1)).exp() / total_BSH.unsqueeze(-1)
    return p_BSHT.masked_fill(~visible_BST.unsqueeze(2), 0.0).sum(dim=2)
