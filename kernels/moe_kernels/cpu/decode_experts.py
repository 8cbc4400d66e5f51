"""A whole mixture of experts on a few rows; `decode_experts.cpp` has the passes and their cost.

Shapes: T rows, D hidden size, E experts, K experts per row. Without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.cpu.operators import all_are, operator
from moe_kernels.reference import decode_experts as reference


def decode_experts(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor | None,
    chosen_TK: Tensor | None,
    routed: Sequence[Tensor],
    shared: Sequence[Tensor],
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
    limit: float | None,
) -> Tensor:
    """[T, D]."""
    how = (groups, top_groups, normalise, scale, limit)
    biases = () if bias_E is None else (bias_E,)
    if torch.is_grad_enabled() or not all_are(torch.float32, x_TD, router_ED, *biases, *routed, *shared):
        return reference.decode_experts(x_TD, router_ED, bias_E, chosen_TK, routed, shared, top_k, score, *how)
    tensors = (tensor.contiguous() for tensor in (*routed, *shared))
    return torch.ops.moe_kernels_cpu.decode_experts(
        x_TD.contiguous(), router_ED.contiguous(), bias_E, chosen_TK, *tensors, top_k, score == "sigmoid", *how
    )


operator(
    "decode_experts(Tensor x, Tensor router, Tensor? bias, Tensor? chosen, Tensor gate_up, Tensor down,"
    " Tensor shared_gate, Tensor shared_up, Tensor shared_down, int choices, bool sigmoid, int groups, int top_groups,"
    " bool normalise, float scale, float? limit) -> Tensor",
    lambda x, *others: torch.empty_like(x),
)
