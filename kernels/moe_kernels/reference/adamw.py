"""One step of AdamW, arXiv 1711.05101, algorithm 2, on lists of tensors, in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdamW:
    """Numbers of one step; weight_decay is decoupled from the gradient, as in the paper."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    eps: float = 1e-8


@dataclass(frozen=True)
class AdamWState:
    """What is kept of each weight: both moments, and the number of steps done before as an fp32 scalar."""

    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]


def adamw_step(weights: list[Tensor], gradients: list[Tensor], state: AdamWState, numbers: AdamW) -> None:
    """Change the weights and raise the state by one step."""
    c = numbers
    rows = zip(weights, gradients, state.first, state.second, state.steps, strict=True)
    for weight, gradient, first, second, step in rows:
        step += 1
        weight.mul_(1 - c.learning_rate * c.weight_decay)
        first.lerp_(gradient, 1 - c.beta1)
        second.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
        scale = (second / (1 - c.beta2**step)).sqrt_().add_(c.eps)
        weight.sub_(c.learning_rate / (1 - c.beta1**step) * first / scale)
