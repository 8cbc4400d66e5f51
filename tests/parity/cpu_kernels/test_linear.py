"""Linear layers."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from kernel_cases import BF16, DTYPES, FP32, FP64, assert_near, assert_same, outputs_and_gradients, random
from torch import Tensor
from torch.nn import functional as F

LAYERS = [(1, 8, 6), (32, 1, 1), (33, 7, 5), (65, 24, 40), (700, 66, 100), (530, 1100, 70), (50, 48, 1200), (0, 4, 6)]


@DTYPES
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    weight = random(outputs, inputs, dtype=dtype) * inputs**-0.5
    assert_same("linear", F.linear, [random(rows, inputs, dtype=dtype), weight])
    assert_same("linear", F.linear, [random(3, inputs, rows, dtype=dtype).mT, weight])


def test_linear_under_autocast_takes_fp32_weights_and_gives_fp32_gradients() -> None:
    def ours(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return moe_kernels.linear(*inputs)

    for rows in (5, 90):
        inputs = [random(rows, 64), random(48, 64) / 8]
        mine, theirs = outputs_and_gradients(ours, inputs), outputs_and_gradients(F.linear, inputs, FP64)
        assert [tensor.dtype for tensor in mine] == [BF16, FP32, FP32]
        assert_near(mine, theirs, BF16)


def test_linear_computes_the_gradients_that_are_wanted() -> None:
    x, weight = random(40, 6), random(8, 6)
    for wanted in ((True, False), (False, True)):
        leaves = [value.clone().requires_grad_(want) for value, want in zip((x, weight), wanted, strict=True)]
        moe_kernels.linear(*leaves).sum().backward()
        assert tuple(leaf.grad is not None for leaf in leaves) == wanted
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        moe_kernels.linear(x, random(8, 7))
