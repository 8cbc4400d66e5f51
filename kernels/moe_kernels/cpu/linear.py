"""A linear layer on many rows; `linear.cpp` has the passes and their cost.

Few rows are PyTorch's, and so is bfloat16 where a matrix unit (AMX) multiplies it.

Shapes: T rows, D inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.cpu.operators import FLOATS, all_are, operator
from moe_kernels.reference import linear as reference

FEWEST = 32  # rows; laying out the weights costs as much as a product of some rows more
AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x weight^T over the last axis, in the dtype of autocast where that is on, else of `x`.

    fp32 weights stay what they are beside rows in bfloat16: they are rounded where they are laid out.
    """
    (rows,) = in_autocast_dtype(x)
    if not _fit(rows, weight_OD):
        return reference.linear(x, weight_OD)
    y_TO = torch.ops.moe_kernels_cpu.linear(rows.flatten(0, -2).contiguous(), weight_OD.contiguous())
    return y_TO.unflatten(0, x.shape[:-1])


def _fit(x: Tensor, weight_OD: Tensor) -> bool:
    """Many rows of a known type; bfloat16 is multiplied in pairs."""
    outputs, inputs = weight_OD.shape
    if x.dtype not in FLOATS or weight_OD.dtype not in (x.dtype, torch.float32) or x.shape[-1] != inputs:
        return False
    if x.dtype is torch.bfloat16 and (AMX or outputs % 2 or inputs % 2):
        return False
    return all_are(weight_OD.dtype, weight_OD) and x.numel() >= FEWEST * inputs and weight_OD.numel() > 0


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
