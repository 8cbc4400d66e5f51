"""A linear layer on a few rows; `skinny_linear.cpp` has its cost. Without gradients.

Shapes: T rows, D inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu.operators import all_are, operator
from moe_kernels.reference import skinny_linear as reference


def skinny_linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x weight^T, [T, O]."""
    if torch.is_grad_enabled() or not all_are(torch.float32, x_TD, weight_OD):
        return reference.skinny_linear(x_TD, weight_OD)
    return torch.ops.moe_kernels_cpu.skinny_linear(x_TD.contiguous(), weight_OD.contiguous())


operator("skinny_linear(Tensor x, Tensor weight) -> Tensor", lambda x, weight: x.new_empty(len(x), len(weight)))
