"""Routed experts: odd sizes, experts without a token, views, autocast."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from kernel_cases import BF16, DTYPES, FP32, FP64, assert_near, assert_same, expert_inputs, outputs_and_gradients
from moe_kernels.reference import experts
from torch import Tensor


@DTYPES
@pytest.mark.parametrize(
    "shape", [(0, 8, 5, 4, 1), (1, 32, 16, 4, 3), (33, 12, 8, 7, 3), (5, 7, 3, 40, 2), (256, 64, 48, 9, 4)], ids=str
)
def test_experts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = expert_inputs(*shape, dtype=dtype)
    assert_same("experts", experts.experts, inputs)
    assert not outputs_and_gradients(moe_kernels.experts, inputs)[-1][-1].any()


def test_experts_with_a_limit_and_views_that_are_not_contiguous() -> None:
    x, chosen, weights, gate_up, down = expert_inputs(40, 12, 8, 7, 3)
    turned = gate_up.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same("experts", experts.experts, [x, chosen, weights.t().contiguous().t(), turned, down, 0.4])


def test_experts_of_fp32_weights_under_autocast_and_as_many_rows_as_no_shape_before() -> None:
    """Rows of an expert are filled up before they are multiplied: what fills them up must not be seen."""
    for tokens in (37, 211, 700):
        inputs = expert_inputs(tokens, 24, 20, 5, 2)

        def ours(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return moe_kernels.experts(*tensors).float()

        mine = outputs_and_gradients(ours, inputs)
        theirs = outputs_and_gradients(experts.experts, inputs, FP64)
        assert [tensor.dtype for tensor in mine] == [FP32] * 5
        assert_near(mine, theirs, BF16)


def test_an_expert_that_does_not_exist_is_refused() -> None:
    x, chosen, *others = expert_inputs(3, 4, 4, 4, 2)
    with pytest.raises(RuntimeError, match="expert 4 does not exist"):
        moe_kernels.experts(x, chosen + 2, *others)
