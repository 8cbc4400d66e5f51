"""Attention: causal, of a window and compressed entries, and the indexer that chooses those."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from kernel_cases import (
    BF16,
    DTYPES,
    FP32,
    FP64,
    assert_in_use,
    assert_near,
    assert_same,
    attention_inputs,
    causal_inputs,
    index_inputs,
    outputs_and_gradients,
)
from moe_kernels.reference import attention, index_scores, window_attention


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 130, 130, 3, 48, 32), (1, 1, 1, 1, 5, 3), (2, 7, 90, 2, 20, 20), (3, 75, 75, 1, 33, 7), (0, 4, 4, 2, 8, 8),
     (1, 40, 5500, 1, 16, 16)],
    ids=str,
)  # fmt: skip
def test_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = causal_inputs(*shape, dtype=dtype)
    assert_same("attention", attention.attention, inputs)
    assert_same("attention", attention.attention, inputs[:-1])


def test_attention_of_views_that_are_not_contiguous() -> None:
    q, k, v, *others = causal_inputs(2, 50, 50, 3, 16, 16)
    both = torch.cat([k, v], dim=-1)
    assert_same(
        "attention", attention.attention, [q.transpose(1, 2).contiguous().transpose(1, 2), *both.chunk(2, -1), *others]
    )


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 512, 4, 64, 128, 64), (1, 5, 3, 7, 2, 4), (2, 33, 2, 20, 0, 16), (3, 100, 5, 24, 37, 8), (2, 1, 4, 8, 1, 16),
     (1, 600, 64, 16, 33, 128), (2, 70, 3, 9, 21, 5)],
    ids=str,
)  # fmt: skip
def test_window_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same("window_attention", window_attention.window_attention, attention_inputs(*shape, dtype=dtype))


def test_window_attention_with_one_mask_for_all_rows_and_under_autocast() -> None:
    q, kv, entries, sinks, near, visible = attention_inputs(2, 40, 2, 8, 10, 8)
    inputs = [q, kv, entries, sinks, near[:1], visible]
    assert_same("window_attention", window_attention.window_attention, inputs)
    with torch.autocast("cpu", dtype=BF16):
        ours = moe_kernels.window_attention(*inputs)[0]
    assert ours.dtype == BF16
    assert_near([ours], [window_attention.window_attention(*inputs)[0]], BF16)


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 150, 8, 32, 37), (1, 1100, 2, 16, 275), (1, 9, 70, 24, 2), (2, 40, 1, 2, 3), (1, 3, 2, 6, 5), (2, 4, 3, 5, 0)],
    ids=str,
)
def test_index_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = index_inputs(*shape, dtype=dtype)
    assert_in_use("index_scores")
    visible = inputs[3]
    ours, theirs = (
        outputs_and_gradients(lambda *given, call=call: call(*given).masked_fill(~visible, 0.0), inputs, exact)
        for call, exact in ((moe_kernels.index_scores, None), (index_scores.index_scores, FP64))
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert_near([mine], [other], FP32 if mine.dtype is FP32 else dtype)
    assert (moe_kernels.index_scores(*inputs)[~visible] == -1e30).all()
