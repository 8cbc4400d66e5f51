"""How evenly tokens use their experts, and the loss that evens it out; `balance.cpp` has the passes and their cost.

Shapes: B rows of S tokens, T = B S, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.cpu.operators import all_are, operator
from moe_kernels.reference import balance as reference


def balance(
    indices_TK: Tensor, scores_TE: Tensor, first_BS: Tensor, real_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(load [E] int64, mean entropy of the shares in nats, loss). Only the loss has a gradient."""
    if not all_are(torch.float32, scores_TE):
        return reference.balance(indices_TK, scores_TE, first_BS, real_BS)
    real = None if real_BS is None else real_BS.contiguous()
    tensors = (indices_TK.contiguous(), scores_TE.contiguous(), first_BS.contiguous())
    loss, entropy, _, load_E = torch.ops.moe_kernels_cpu.balance(*tensors, real)
    return load_E, entropy, loss


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(output[2])


def _gradients(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    return None, slope * d_loss, None, None


operator(
    "balance(Tensor indices, Tensor scores, Tensor first, Tensor? real) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda indices, scores, *_: (
        scores.new_empty(()),
        scores.new_empty(()),
        torch.empty_like(scores),
        indices.new_empty(scores.shape[1]),
    ),
    (_keep, _gradients),
)
