"""One step of AdamW, arXiv 1711.05101, algorithm 2, on a list of tensors, in place."""

from __future__ import annotations

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
    for weight, gradient, first, second, step in zip(
        weights, gradients, first_moments, second_moments, steps, strict=True
    ):
        step += 1
        weight.mul_(1 - learning_rate * weight_decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (second / (1 - beta2**step)).sqrt_().add_(eps)
        weight.sub_(learning_rate / (1 - beta1**step) * first / scale)
