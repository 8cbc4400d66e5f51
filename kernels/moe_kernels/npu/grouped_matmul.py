"""All experts in one matrix product, forwards and backwards. The operator has no gradient of its own.

Shapes: N rows, D inputs, F outputs, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEEDS = {"npu_grouped_matmul": ("group_list", "split_item", "group_type", "group_list_type")}
ROWS, INNER = 0, 2  # group_type: which axis of x the groups divide
SIZES = 1  # group_list_type: the list holds the rows of each group, not their running ends


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """x @ weight[e]^T for the rows of each expert; counts int64, on the device."""
    return _GroupedMatmul.apply(x_ND, weight_EFD, counts_E)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EFD, counts_E)
        return _product(x_ND, weight_EFD.transpose(1, 2), counts_E, ROWS)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_EFD, counts_E = ctx.saved_tensors
        d_x_ND = _product(grad_NF, weight_EFD, counts_E, ROWS) if ctx.needs_input_grad[0] else None
        d_weight_EFD = _product(grad_NF.t(), x_ND, counts_E, INNER) if ctx.needs_input_grad[1] else None
        return d_x_ND, d_weight_EFD, None


def _product(x: Tensor, weight: Tensor, counts_E: Tensor, group_type: int) -> Tensor:
    """One output for all groups: split_item 2 for rows, 3 for the inner axis."""
    split_item = 2 if group_type == ROWS else 3
    return torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=counts_E, split_item=split_item, group_type=group_type, group_list_type=SIZES
    )[0]
