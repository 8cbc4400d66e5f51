"""One step of AdamW, one operator per tensor: what torch.optim.AdamW(fused=True) calls."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = list[Tensor]


def adamw_step(
    weights: Tensors,
    gradients: Tensors,
    first_moments: Tensors,
    second_moments: Tensors,
    steps: Tensors,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """steps: fp32 scalars, the number of steps done before; each is raised by one."""
    torch._foreach_add_(steps, 1)
    keywords = {"lr": learning_rate, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
    lists = (weights, gradients, first_moments, second_moments, [], steps)
    torch._fused_adamw_(*lists, amsgrad=False, maximize=False, **keywords)
