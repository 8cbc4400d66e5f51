"""What each operation of a V4 step costs, forwards and backwards, with the kernels of this device and by the reference.

    python kernels/bench/operations.py --tokens 4096 --rounds 7 --output operations.json

Shapes are those of the preset `demo`, in float32 and, where autocast would have it so, bfloat16. Both sides compute the
same inputs in one process, in turn; times are medians of forward and backward together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import moe_kernels
import torch
from measure import Row, Settings, in_turn, main, ratio
from torch import Tensor

from model import ModelConfig

LENGTH = 512
Inputs = list[Any]


def measure(settings: Settings, arguments: argparse.Namespace) -> list[Row]:
    """One row an operation and dtype: how many times faster than the reference."""
    rows = []
    for name, dtype, inputs in cases(arguments.tokens, settings.device):
        call = getattr(moe_kernels, name)
        sides = {"kernels": lambda: run(call, inputs), "reference": lambda: referenced(call, inputs)}  # noqa: B023
        times = in_turn(sides, settings.rounds, settings.device)
        value, spread = ratio(times["reference"], times["kernels"])
        texts = [f"{1e3 * median(seconds):.2f} ms" for seconds in times.values()]
        what = f"{name}, {str(dtype).removeprefix('torch.')}"
        rows.append(Row(what, what, 1.0, value, unit="x", spread=spread, ours=texts[0], peer=texts[1]))
    return rows


def cases(tokens: int, device: torch.device) -> list[tuple[str, torch.dtype, Inputs]]:
    """(operation, dtype, inputs) of every operation that a backend may have."""
    c, generator = ModelConfig.preset("demo"), torch.Generator().manual_seed(0)
    n, d, f, e, k, h = c.hc_mult, c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok, 4
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    streams, count, rows = random(tokens, n, d), n * (n + 2), tokens // LENGTH
    maps = [random(count, n * d) * 0.02, random(count), random(3)]
    found: list[tuple[str, torch.dtype, Inputs]] = [
        ("hyper_read", torch.float32, [streams, *maps, 1e-6, c.hc_sinkhorn_iters, c.hc_eps]),
        ("hyper_write", torch.float32, [streams, random(tokens, d), random(tokens, n), random(tokens, n, n)]),
        ("rms_norm", torch.float32, [random(tokens, d), random(d), 1e-6]),
    ]
    angles = random(rows, LENGTH, 1, c.qk_rope_head_dim // 2)
    chosen = torch.rand(tokens, e, generator=generator).topk(k).indices
    targets = torch.randint(0, c.vocab_size, (tokens // 2,), generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        weights = [(random(e, 2 * f, d) * 0.05).to(dtype), (random(e, d, f) * 0.05).to(dtype)]
        heads = random(rows, LENGTH, h, c.head_dim).to(dtype)
        found += [
            (
                "experts",
                dtype,
                [random(tokens, d).to(dtype), chosen, random(tokens, k).abs(), *weights, c.swiglu_limit],
            ),
            ("swiglu", dtype, [random(tokens, 2 * f).to(dtype), c.swiglu_limit]),
            ("rms_norm", dtype, [heads, None, 1e-6]),
            ("rotate", dtype, [heads, angles.cos().detach(), angles.sin().detach()]),
            ("window_attention", dtype, attention(c, rows, heads, generator)),
            (
                "cross_entropy_with_gradient",
                dtype,
                [random(tokens // 2, c.vocab_size).to(dtype), targets, angles.mean()],
            ),
        ]
    moved = lambda value: value.to(device) if isinstance(value, Tensor) else value  # noqa: E731
    return [(name, dtype, [moved(value) for value in inputs]) for name, dtype, inputs in found]


def attention(c: ModelConfig, rows: int, q_BSHD: Tensor, generator: torch.Generator) -> Inputs:
    """One document a row, an entry for every fourth token, of which half are chosen."""
    window, entries, places = c.sliding_window, LENGTH // 4, torch.arange(LENGTH)
    keys = (places // window * window - window)[:, None] + torch.arange(2 * window)
    near = (keys <= places[:, None]) & (keys > places[:, None] - window) & (keys >= 0)
    chosen = torch.rand(rows, LENGTH, entries, generator=generator) < 0.5
    visible = chosen & (torch.arange(entries) * 4 + 4 <= places[:, None])
    kv, packed = (torch.randn(rows, size, c.head_dim, generator=generator) for size in (LENGTH, entries))
    return [q_BSHD, kv.to(q_BSHD.dtype), packed.to(q_BSHD.dtype), torch.zeros(q_BSHD.shape[2]), near[None], visible]


def referenced(call: Callable[..., Any], inputs: Inputs) -> None:
    """`run` by the reference."""
    with moe_kernels.reference_only():
        run(call, inputs)


def run(call: Callable[..., Any], inputs: Inputs) -> None:
    """One forward pass and, where there is a gradient, the backward pass."""
    leaves = [v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim else v for v in inputs]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    smooth = [result for result in results if result.requires_grad]
    if smooth:
        torch.autograd.backward(smooth, [torch.ones_like(result) for result in smooth])
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf.grad = None


if __name__ == "__main__":
    main("Time of each operation.", measure, ("--tokens", {"type": int, "default": 4096}))
