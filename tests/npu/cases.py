"""Inputs of each operation for the tests on `npu`, and one way to run both sides and compare values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import moe_kernels
import torch
from torch import Tensor

NPU = torch.device("npu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the norm of the difference over the norm of the reference


@dataclass
class Case:
    """Positional inputs (floating-point ones get gradients) and keyword arguments of one call."""

    inputs: list[Any]
    keywords: dict[str, Any] = field(default_factory=dict)

    def leaves(self, device: torch.device) -> list[Any]:
        """The inputs on a device with the strides they have, ready for a backward pass."""
        return [_leaf(value, device) if isinstance(value, Tensor) else value for value in self.inputs]


def _leaf(value: Tensor, device: torch.device) -> Tensor:
    if value.is_contiguous():
        return value.detach().to(device).requires_grad_(value.is_floating_point())
    moved = value.transpose(0, 1).contiguous().to(device).transpose(0, 1)
    assert moved.stride() == value.stride()
    return moved.detach().requires_grad_(value.is_floating_point())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def chosen_experts(tokens: int, top_k: int, used: int, seed: int = 0) -> Tensor:
    """Distinct unsorted experts per token, from the first `used`."""
    return (
        torch.rand(tokens, used, generator=torch.Generator().manual_seed(seed + tokens))
        .argsort(dim=1)[:, :top_k]
        .contiguous()
    )


def angles(batch: int, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    turns = torch.rand(batch, tokens, 1, channels // 2, generator=torch.Generator().manual_seed(tokens)) * 6.28
    return turns.cos(), turns.sin()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the reference, which counts as at least 0.01 an element."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-2 * max(theirs.numel(), 1) ** 0.5))


def outputs_and_gradients(call: Callable[..., Any], case: Case, device: torch.device) -> list[Tensor]:
    """Floating-point results of the call, then the gradients of its floating-point inputs; the CPU is the reference."""
    leaves = case.leaves(device)
    with moe_kernels.reference_only() if device.type == "cpu" else nullcontext():
        results = call(*leaves, **case.keywords)
    results = results if isinstance(results, tuple) else (results,)
    smooth = [result for result in results if result.requires_grad]
    torch.autograd.backward(smooth, [random(*result.shape, dtype=result.dtype, seed=7).to(device) for result in smooth])
    gradients = [leaf.grad for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [*results, *gradients]
