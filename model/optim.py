"""AdamW (arXiv 1711.05101) with weight decay on matrices only, and the router-bias rule of DeepSeek-V3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.moe import Router


def adamw(net: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, betas 0.9 and 0.95 (arXiv 2412.19437, section 4.2)."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def balance_experts(net: nn.Module, expert_load_ME: Tensor, speed: float) -> None:
    """Raise the selection bias of experts below the mean load by `speed`, lower the others (section 2.1.2).

    expert_load_ME: tokens that each expert of each layer took in the whole batch.
    """
    routers = [module for module in net.modules() if isinstance(module, Router)]
    for router, load_E in zip(routers, expert_load_ME.float(), strict=True):
        router.e_score_correction_bias += speed * (load_E.mean() - load_E).sign()
