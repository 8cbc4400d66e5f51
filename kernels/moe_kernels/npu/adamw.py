"""One step of AdamW, one operator per tensor: what torch.optim.AdamW(fused=True) calls."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.reference.adamw import AdamW, AdamWState


def adamw_step(weights: list[Tensor], gradients: list[Tensor], state: AdamWState, numbers: AdamW) -> None:
    """Change the weights and raise the state by one step."""
    torch._foreach_add_(state.steps, 1)
    c, lists = numbers, (weights, gradients, state.first, state.second, [], state.steps)
    keywords = {"lr": c.learning_rate, "beta1": c.beta1, "beta2": c.beta2, "weight_decay": c.weight_decay, "eps": c.eps}
    torch._fused_adamw_(*lists, amsgrad=False, maximize=False, **keywords)
