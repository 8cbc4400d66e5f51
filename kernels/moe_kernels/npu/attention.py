"""Causal attention within documents in one operator, with its own backward pass.

Documents lie one after the other (layout TND) and the operator takes their running ends, so that no mask of [S, T] is
made; the causal mask inside of each comes from a compressed one of 2048 by 2048. A few queries at the end of a cache
get the whole mask. True means hidden, the opposite of PyTorch's masks. The ends are a list on the host: reading them
waits for the device, once for the layers that share `document_ids_BT`.

Shapes: B batch, S queries, T keys, H heads, D query and key channels, V value channels, N = B * S tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moe_kernels.reference.attention import hidden

NEEDS = {
    "npu_fusion_attention": (
        *("head_num", "input_layout", "atten_mask", "scale", "sparse_mode"),
        *("actual_seq_qlen", "actual_seq_kvlen", "sink"),
    ),
    "npu_fusion_attention_grad": (
        *("head_num", "input_layout", "atten_mask", "softmax_max", "softmax_sum", "attention_in"),
        *("scale_value", "sparse_mode", "actual_seq_qlen", "actual_seq_kvlen"),
    ),
}
COMPRESSED, MOST_DOCUMENTS = 2048, 2048  # side of the compressed mask; documents that one call takes
GIVEN_MASK, CAUSAL_FROM_THE_END = 1, 3  # sparse_mode
Parts = list[tuple[slice, list[int]]]
_parts_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # document ids -> Parts


def attention(
    q_BSHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float, document_ids_BT: Tensor | None = None
) -> Tensor:
    """[B, S, H, V]."""
    rows, queries, heads = q_BSHD.shape[:3]
    if queries == k_BTHD.shape[1]:
        tensors = (tensor.flatten(0, 1) for tensor in (q_BSHD, k_BTHD, v_BTHV))
        return _within_documents(*tensors, rows, document_ids_BT, scale)[0].unflatten(0, (rows, queries))
    mask = hidden(queries, k_BTHD, document_ids_BT)
    return torch.ops.npu.npu_fusion_attention(
        q_BSHD, k_BTHD, v_BTHV, heads, "BSND", atten_mask=mask, scale=scale, sparse_mode=GIVEN_MASK
    )[0]


@torch.library.custom_op("moe_kernels_npu::attention", mutates_args=())
def _within_documents(
    q_NHD: Tensor, k_NHD: Tensor, v_NHV: Tensor, rows: int, document_ids_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [N, H, V], maximum and sum of each softmax [N, H, 8], for the backward pass)."""
    found = [
        torch.ops.npu.npu_fusion_attention(
            *(tensor[tokens] for tensor in (q_NHD, k_NHD, v_NHV)), q_NHD.shape[1], "TND", scale=scale, **_causal(q_NHD),
            actual_seq_qlen=ends, actual_seq_kvlen=ends,
        )[:3]
        for tokens, ends in _parts(len(q_NHD), rows, document_ids_BT)
    ]  # fmt: skip
    return _joined(found)


@_within_documents.register_fake
def _(
    q_NHD: Tensor, k_NHD: Tensor, v_NHV: Tensor, rows: int, document_ids_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = q_NHD.new_empty(*q_NHD.shape[:2], 8, dtype=torch.float32)
    return q_NHD.new_empty(*q_NHD.shape[:2], v_NHV.shape[2]), statistic, torch.empty_like(statistic)


@torch.library.custom_op("moe_kernels_npu::attention_backward", mutates_args=())
def _backward(
    grad_NHV: Tensor,
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHV: Tensor,
    out_NHV: Tensor,
    top_NH8: Tensor,
    total_NH8: Tensor,
    rows: int,
    document_ids_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    found = [
        torch.ops.npu.npu_fusion_attention_grad(
            *(tensor[tokens] for tensor in (q_NHD, k_NHD, v_NHV, grad_NHV)), q_NHD.shape[1], "TND",
            softmax_max=top_NH8[tokens], softmax_sum=total_NH8[tokens], attention_in=out_NHV[tokens],
            scale_value=scale, **_causal(q_NHD), actual_seq_qlen=ends, actual_seq_kvlen=ends,
        )[:3]
        for tokens, ends in _parts(len(q_NHD), rows, document_ids_BT)
    ]  # fmt: skip
    return _joined(found)


@_backward.register_fake
def _(grad_NHV: Tensor, q_NHD: Tensor, k_NHD: Tensor, v_NHV: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_NHD), torch.empty_like(k_NHD), torch.empty_like(v_NHV)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q_NHD, k_NHD, v_NHV, ctx.rows, documents, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q_NHD, k_NHD, v_NHV, *output, documents)


def _gradients(ctx: Any, grad_NHV: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, documents = ctx.saved_tensors
    return *_backward(grad_NHV.contiguous(), *tensors, ctx.rows, documents, ctx.scale), None, None, None


_within_documents.register_autograd(_gradients, setup_context=_keep)


def _parts(tokens: int, rows: int, document_ids_BT: Tensor | None) -> Parts:
    """(tokens of a call, running ends of its documents among them); one call, if there are not too many documents."""
    if document_ids_BT is None:
        return _cut(list(range(tokens // rows, tokens + 1, tokens // rows)))
    if document_ids_BT not in _parts_of:
        last_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)  # of its document; every row ends one
        last_BT[:, :-1] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
        _parts_of[document_ids_BT] = _cut((last_BT.flatten().nonzero().flatten() + 1).tolist())
    return _parts_of[document_ids_BT]


def _cut(ends: list[int]) -> Parts:
    parts, start = [], 0
    for first in range(0, len(ends), MOST_DOCUMENTS):
        some = ends[first : first + MOST_DOCUMENTS]
        parts.append((slice(start, some[-1]), [end - start for end in some]))
        start = some[-1]
    return parts


def _joined(found: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return found[0] if len(found) == 1 else tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _causal(x: Tensor) -> dict[str, Any]:
    return {"atten_mask": _compressed_mask(x.device), "sparse_mode": CAUSAL_FROM_THE_END}


@cache
def _compressed_mask(device: torch.device) -> Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu(1)
