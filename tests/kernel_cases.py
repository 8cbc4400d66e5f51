"""Inputs of each operation and how its results are compared with the reference, for every backend's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import moe_kernels
import pytest
import torch
from moe_kernels import numerics
from torch import Tensor

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
BACKEND = "cpu"  # of all operations; tests of another backend take its place
TOLERANCE = {FP32: 1e-5, BF16: 1e-2}  # of the norm of the difference over the norm of the reference


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return numerics.random(*shape, seed=seed).to(dtype)


def distance(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the reference, as the passport has it; infinite for another shape."""
    return numerics.worst("", "", ours, exact).error


def outputs_and_gradients(
    call: Callable[..., Any], inputs: list[Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Results, then gradients of every floating-point input, with the same upstream gradients for every dtype."""
    return list(numerics.results(call, [numerics.cast(value, dtype) if dtype else value for value in inputs]).values())


def assert_in_use(operation: str) -> None:
    assert moe_kernels.chosen(torch.device("cpu"))[operation] == BACKEND


def assert_near(ours: Iterable[Tensor], exact: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Each of ours is within the tolerance of computing in `dtype`."""
    assert max(distance(mine, other) for mine, other in zip(ours, exact, strict=True)) <= TOLERANCE[dtype]


def assert_same(operation: str, exact: Callable[..., Any], inputs: list[Any]) -> None:
    """The operation gives what `exact` gives in float64: values, and the gradient of every input."""
    assert_in_use(operation)
    dtype = next(value.dtype for value in inputs if isinstance(value, Tensor) and value.is_floating_point())
    ours = outputs_and_gradients(getattr(moe_kernels, operation), inputs)
    assert_near(ours, outputs_and_gradients(exact, inputs, FP64), dtype)


def attention_inputs(
    rows: int, length: int, heads: int, width: int, entries: int, window: int, dtype: torch.dtype = FP32
) -> list[Any]:
    """Documents of about 30 tokens; a third of the entries of the past is visible, in some rows none."""
    places = torch.arange(length)
    keys = (places // window * window - window)[:, None] + torch.arange(2 * window)
    starts = random(rows, length, seed=1) > 1.8
    first = torch.where(starts, places, 0).cummax(dim=1).values
    near = (keys <= places[:, None]) & (keys > places[:, None] - window) & (keys >= first[:, :, None])
    past = torch.arange(entries) * length < places[:, None] * entries
    visible = past & (random(rows, length, entries, seed=2) > 0.4) & (random(rows, length, 1, seed=3) > -1)
    tensors = [random(rows, length, heads, width), random(rows, length, width), random(rows, entries, width)]
    return [*(tensor.to(dtype) for tensor in tensors), random(heads), near, visible]


def causal_inputs(
    rows: int, queries: int, keys: int, heads: int, width: int, values: int, dtype: torch.dtype = FP32
) -> list[Any]:
    """Documents of about 20 tokens; one of them goes on after another has come between."""
    documents = (random(rows, keys, seed=4) > 1.6).cumsum(dim=1) % 5
    tensors = [random(rows, queries, heads, width), random(rows, keys, heads, width), random(rows, keys, heads, values)]
    return [*(tensor.to(dtype) for tensor in tensors), width**-0.5, documents]


def index_inputs(rows: int, tokens: int, heads: int, channels: int, entries: int, dtype: torch.dtype) -> list[Any]:
    """Entries of four tokens, some of which are hidden from all, as those of another document are."""
    tensors = [random(rows, tokens, heads, channels, dtype=dtype), random(rows, tokens, heads)]
    visible = (torch.arange(entries) * 4 + 3 <= torch.arange(tokens)[:, None]) & (torch.arange(entries) % 7 != 2)
    return [*tensors, random(rows, entries, channels, dtype=dtype), visible.expand(rows, -1, -1)]


def expert_inputs(tokens: int, width: int, inner: int, count: int, top_k: int, dtype: torch.dtype = FP32) -> list[Any]:
    gate_up, down = random(count, 2 * inner, width) * width**-0.5, random(count, width, inner) * inner**-0.5
    chosen, weights = chosen_experts(tokens, count, top_k), random(tokens, top_k).abs()
    return [random(tokens, width).to(dtype), chosen, weights, gate_up.to(dtype), down.to(dtype)]


def chosen_experts(tokens: int, count: int, top_k: int) -> Tensor:
    """The last expert gets no token."""
    scores = torch.rand(tokens, count - 1, generator=torch.Generator().manual_seed(tokens))
    return scores.argsort(dim=1)[:, :top_k].contiguous()


def balance_inputs(rows: int, length: int, count: int, top_k: int, padded: bool) -> list[Any]:
    """Documents of about eight tokens."""
    starts, places = random(rows, length, seed=1) > 1.2, torch.arange(length)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    chosen = chosen_experts(rows * length, count, top_k)
    real = random(rows, length, seed=2) > -0.7 if padded else None
    return [chosen, random(rows * length, count).sigmoid(), first, real]


def read_inputs(tokens: int, streams: int, width: int) -> list[Any]:
    count = streams * (streams + 2)
    tensors = [random(tokens, streams, width), random(count, streams * width) * 0.1, random(count), random(3) + 1]
    return [*tensors, 1e-6, 20, 1e-6]


def head_inputs(tokens: int, streams: int, width: int) -> list[Any]:
    tensors = [random(tokens, streams, width), random(streams, streams * width) * 0.1, random(streams), random(1) + 1]
    return [*tensors, 1e-6, 1e-6]


def write_inputs(tokens: int, streams: int, width: int) -> list[Any]:
    return [
        random(tokens, streams, width),
        random(tokens, width),
        random(tokens, streams),
        random(tokens, streams, streams),
    ]


def angles(rows: int, length: int, channels: int) -> tuple[Tensor, Tensor]:
    turns = random(rows, length, 1, channels // 2, seed=5) * 3
    return turns.cos(), turns.sin()
