"""One step of AdamW in place, one pass over each tensor and its moments. fp32 inside."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import adamw as reference
from moe_kernels.reference.adamw import AdamW, AdamWState
from moe_kernels.triton.tiles import ELEMENTS, fit, grid


def adamw_step(weights: list[Tensor], gradients: list[Tensor], state: AdamWState, numbers: AdamW) -> None:
    """Change the weights and raise the state by one step."""
    written = (*weights, *state.first, *state.second)
    if not fit(*written, *gradients) or not all(tensor.is_contiguous() for tensor in written):
        return reference.adamw_step(weights, gradients, state, numbers)
    torch._foreach_add_(state.steps, 1)
    c, (log1, log2) = numbers, (math.log(beta) if beta else -math.inf for beta in (numbers.beta1, numbers.beta2))
    rows = zip(weights, gradients, state.first, state.second, state.steps, strict=True)
    for weight, gradient, first, second, step in rows:
        block = min(ELEMENTS, triton.next_power_of_2(max(1, weight.numel())))
        _step[grid(triton.cdiv(weight.numel(), block), weight)](
            weight, gradient.contiguous(), first, second, step, weight.numel(), c.learning_rate, c.beta1, c.beta2,
            log1, log2, c.learning_rate * c.weight_decay, c.eps, block,
        )  # fmt: skip
    return None


@triton.jit
def _missing(exponent) -> tl.tensor:
    """1 - exp(exponent) for exponents of 0 or less, by its series where the difference would lose digits."""
    series = -exponent * (1 + exponent / 2 * (1 + exponent / 3 * (1 + exponent / 4 * (1 + exponent / 5))))
    return tl.where(exponent > -0.1, series, 1.0 - tl.exp(exponent))


@triton.jit
def _step(
    weight, gradient, first, second, steps, count, rate, beta1, beta2, log1, log2, decay, eps, BLOCK: tl.constexpr
) -> None:
    """log1, log2: natural logarithms of the betas."""
    step = tl.load(steps)
    missing1 = _missing(step * log1)
    missing2 = _missing(step * log2)
    for task in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        start = tl.cast(task, tl.int64) * BLOCK
        place = tl.arange(0, BLOCK)
        inside = place < tl.minimum(count - start, BLOCK).to(tl.int32)
        slope = tl.load(gradient + start + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(first + start + place, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(second + start + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(weight + start + place, mask=inside, other=0.0).to(tl.float32)
        mean += (1.0 - beta1) * (slope - mean)
        square = beta2 * square + (1.0 - beta2) * slope * slope
        value = value * (1.0 - decay) - rate / missing1 * mean / (tl.sqrt(square / missing2) + eps)
        tl.store(weight + start + place, value.to(weight.dtype.element_ty), mask=inside)
        tl.store(first + start + place, mean.to(first.dtype.element_ty), mask=inside)
        tl.store(second + start + place, square.to(second.dtype.element_ty), mask=inside)
