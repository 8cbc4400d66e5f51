"""Sorting tokens by expert and bringing them back, one operator each way.

Shapes: T tokens, D hidden size, E experts, K experts per token, N = T * K rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEEDS = {
    "npu_moe_token_permute": ("tokens", "indices"),
    "npu_moe_token_unpermute": ("sorted_indices", "probs"),
    "npu_moe_token_unpermute_grad": ("grad_unpermuted_tokens", "sorted_indices", "probs"),
}


def permute(x_TD: Tensor, indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [N, D], place [T, K] int32 of each choice, rows of each expert [E] int64)."""
    rows_ND, places_N = torch.ops.npu.npu_moe_token_permute(x_TD, indices_TK.to(torch.int32))
    return rows_ND, places_N.view_as(indices_TK), expert_load(indices_TK, num_experts)


def expert_load(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Rows that each expert gets, [E] int64, from a histogram: its length does not depend on the data."""
    counts_E = torch.histc(indices_TK.float(), bins=num_experts, min=0, max=num_experts - 1)
    return counts_E.to(torch.int64)


def unpermute(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's rows."""
    return _unpermute(y_ND, places_TK.flatten(), weights_TK.to(y_ND.dtype))


@torch.library.custom_op("moe_kernels_npu::unpermute", mutates_args=())
def _unpermute(y_ND: Tensor, places_N: Tensor, weights_TK: Tensor) -> Tensor:
    """An operator of its own: torch_npu's returns its input as a second output, which torch.compile does not allow."""
    return torch.ops.npu.npu_moe_token_unpermute(y_ND, places_N, probs=weights_TK)


@_unpermute.register_fake
def _(y_ND: Tensor, places_N: Tensor, weights_TK: Tensor) -> Tensor:
    return y_ND.new_empty(len(weights_TK), y_ND.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor]:
    y_ND, places_N, weights_TK = ctx.saved_tensors
    d_y_ND, d_weights_TK = torch.ops.npu.npu_moe_token_unpermute_grad(y_ND, grad_TD, places_N, probs=weights_TK)
    return d_y_ND, None, d_weights_TK


_unpermute.register_autograd(_gradients, setup_context=_keep)
