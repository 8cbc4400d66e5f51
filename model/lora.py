"""Low-rank adaptation (arXiv 2106.09685): W + (alpha / rank) * B A, trained while W rests, merged at the end.

Every matrix of the blocks takes part but those of routers and hyper-connections; each expert gets a pair of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model.optim import role


class LowRank(nn.Module):
    """The update of one weight [..., out, in]; starts at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, out, inner = weight.shape
        bound = 1 / math.sqrt(inner)
        self.a = nn.Parameter(torch.empty(*stack, rank, inner).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(*stack, out, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def add_lora(net: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze `net`; give every matrix of its layers, routers and hyper-connections excepted, a trainable update."""
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, weight in list(net.named_parameters()):
        owner, _, name = path.rpartition(".")
        if role(path, weight) != "matrix" or ".layers." not in path or owner.endswith((".gate", "_hc")):
            continue
        update = LowRank(weight, min(rank, *weight.shape[-2:]), alpha, generator)
        parametrize.register_parametrization(net.get_submodule(owner), name, update)


def merge_lora(net: nn.Module) -> None:
    """Write the updates into the weights and remove them; all parameters can be trained again."""
    for module in list(net.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    net.requires_grad_(True)
