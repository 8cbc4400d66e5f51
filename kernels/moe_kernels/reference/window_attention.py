"""Attention of DeepSeek-V4's core: one key that is also the value, a window of raw tokens, compressed entries, a sink.

Shapes: B rows, S queries, K keys, H heads, D channels, T compressed entries, W tokens of the window.

p = softmax over [allowed keys ; visible entries ; sink_h] of D^-0.5 q . k; out = p . [keys ; entries]; the sink takes
probability and has no value. arXiv 2606.19348, section 2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PART = 64  # entries that are summed at a time over a cache


def window_attention(
    q_BSHD: Tensor, kv_BSD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, window_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries over their own rows: (out [B, S, H, D], probability of each entry summed over heads [B, S, T], detached).

    window_BSK: [B or 1, S, 2 W], what each token may see of the chunk of W tokens before its own, and of its own.
    The rows are cut into chunks of W, so that the work grows with S W and not with S^2.
    """
    rows, length, heads, width = q_BSHD.shape
    window = window_BSK.shape[-1] // 2
    short = -length % window
    q_BSHD = F.pad(q_BSHD, (0, 0, 0, 0, 0, short))
    chunks_CKD = chunks(kv_BSD, window)
    q_CSD = q_BSHD.reshape(len(chunks_CKD), window * heads, width)
    near_BSHK = torch.bmm(q_CSD, chunks_CKD.mT).view(rows, -1, heads, 2 * window)[:, :length]
    far_BSHT = _far(q_BSHD[:, :length], entries_BTD)
    p_near, p_far = _probabilities(near_BSHK, far_BSHT, sinks_H, window_BSK, visible_BST, width)
    p_CSK = F.pad(p_near, (0, 0, 0, 0, 0, short)).view(len(chunks_CKD), window * heads, 2 * window)
    out_BSHD = torch.bmm(p_CSK.to(chunks_CKD.dtype), chunks_CKD).view(rows, -1, heads, width)[:, :length]
    return out_BSHD + _from_entries(p_far, entries_BTD), p_far.detach().sum(dim=2)


def chunks(kv_BSD: Tensor, window: int) -> Tensor:
    """Each chunk of W tokens of each row, after the W tokens before it: [C, 2 W, D]; zeros where a row has none."""
    kv_BnWD = F.pad(kv_BSD, (0, 0, window, -kv_BSD.shape[1] % window)).unflatten(1, (-1, window))
    return torch.cat([kv_BnWD[:, :-1], kv_BnWD[:, 1:]], dim=2).flatten(0, 1)


def cached_window_attention(
    q_BSHD: Tensor, kv_BKD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, allowed_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """The same over any keys, with what each query may see of them [B, S, K].

    A row's result does not depend on how many entries, that it does not see, follow on its own.
    """
    near_BSHK = _far(q_BSHD, kv_BKD)
    far_BSHT = _far(q_BSHD, entries_BTD)
    p_near, p_far = _probabilities(near_BSHK, far_BSHT, sinks_H, allowed_BSK, visible_BST, q_BSHD.shape[-1])
    parts = zip(p_far.split(PART, dim=-1), entries_BTD.split(PART, dim=1), strict=True)
    out_BSHD = _from_entries(p_near, kv_BKD)
    for p_BSHt, entries_BtD in parts:
        out_BSHD = out_BSHD + _from_entries(p_BSHt, entries_BtD)
    return out_BSHD, p_far.detach().sum(dim=2)


def _far(q_BSHD: Tensor, keys_BTD: Tensor) -> Tensor:
    return torch.bmm(q_BSHD.flatten(1, 2), keys_BTD.mT).unflatten(1, q_BSHD.shape[1:3])


def _from_entries(p_BSHT: Tensor, entries_BTD: Tensor) -> Tensor:
    return torch.bmm(p_BSHT.flatten(1, 2).to(entries_BTD.dtype), entries_BTD).unflatten(1, p_BSHT.shape[1:3])


def _probabilities(
    near_BSHK: Tensor, far_BSHT: Tensor, sinks_H: Tensor, window_BSK: Tensor, visible_BST: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """fp32, of keys and of entries; the rest up to 1 is the sink's."""
    allowed = torch.cat([window_BSK.expand(len(near_BSHK), -1, -1), visible_BST], dim=-1).unsqueeze(2)
    logits = torch.cat([near_BSHK.float(), far_BSHT.float()], dim=-1) * width**-0.5
    logits = logits.masked_fill(~allowed, float("-inf"))
    sinks = sinks_H.float()[:, None].expand(*logits.shape[:-1], 1)
    return (
        torch.cat([sinks, logits], dim=-1)
        .softmax(dim=-1)[..., 1:]
        .split([near_BSHK.shape[-1], far_BSHT.shape[-1]], dim=-1)
    )
