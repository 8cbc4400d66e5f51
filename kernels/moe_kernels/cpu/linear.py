"""A linear layer on many rows; `linear.cpp` has the passes and their cost. Few rows are PyTorch's.

Shapes: T rows, D inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import FLOATS, all_are, operator
from moe_kernels.reference import linear as reference
from moe_kernels.reference.experts import in_autocast_dtype

FEWEST = 32  # rows; laying out the weights costs as much as a product of some rows more


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x weight^T over the last axis, in the dtype of autocast where that is on, else of `x`.

    fp32 weights stay what they are beside rows in bfloat16: they are rounded where they are laid out.
    """
    (rows,) = in_autocast_dtype(x)
    pairs = rows.dtype is torch.float32 or weight_OD.shape[0] % 2 == weight_OD.shape[1] % 2 == 0
    many = x.numel() >= FEWEST * x.shape[-1] > 0 and weight_OD.numel() > 0
    fits = rows.dtype in FLOATS and all_are(weight_OD.dtype, weight_OD) and weight_OD.dtype in (rows.dtype, torch.float32)
    if not (fits and pairs and many) or x.shape[-1] != weight_OD.shape[1]:
        return reference.linear(x, weight_OD)
    y_TO = torch.ops.moe_kernels_cpu.linear(rows.flatten(0, -2).contiguous(), weight_OD.contiguous())
    return y_TO.unflatten(0, x.shape[:-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wanted = ctx.needs_input_grad[:2]
    found = torch.ops.moe_kernels_cpu.linear_backward(grad.contiguous(), *ctx.saved_tensors, *wanted)
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


operator(
    "linear(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: x.new_empty(len(x), len(weight)),
    (_keep, _gradients),
)
operator(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool of_x, bool of_weight) -> (Tensor, Tensor)",
    lambda grad, x, weight, of_x, of_weight: (
        x.new_empty(len(x) if of_x else 0, x.shape[1]),
        weight.new_empty(len(weight) if of_weight else 0, weight.shape[1]),
    ),
)
