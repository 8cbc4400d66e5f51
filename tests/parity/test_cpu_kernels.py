"""Each compiled operation of the CPU against the reference in float64: values and the gradient of every input."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import moe_kernels
import pytest
import torch
from moe_kernels.cpu import library
from moe_kernels.reference import (
    attention,
    balance,
    experts,
    hyper_connection,
    index_scores,
    newton_schulz,
    swiglu,
    window_attention,
)
from torch import Tensor
from torch.nn import functional as F

from model import ModelConfig, build
from model.losses import losses_of
from model.optim import adamw

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
BACKEND = "cpu"  # of all operations; tests of another backend take its place
TOLERANCE = {FP32: 1e-5, BF16: 1e-2}  # of the norm of the difference over the norm of the reference


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not any(map(shutil.which, library.COMPILERS)):
        pytest.skip("needs a C++ compiler")
    assert library.load()


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def distance(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the reference, which counts as at least 0.01 an element."""
    assert ours.shape == exact.shape
    floor = 1e-2 * max(exact.numel(), 1) ** 0.5
    ours, exact = (tensor.detach().double() for tensor in (ours, exact))
    return float((ours - exact).norm() / exact.norm().clamp(min=floor))


def outputs_and_gradients(
    call: Callable[..., Any], inputs: list[Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Results, then gradients of every floating-point input, with the same upstream gradients for every dtype."""
    leaves = [
        value.detach().to(dtype or value.dtype).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in inputs
    ]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    smooth = [result for result in results if result.requires_grad]
    upstream = [random(*result.shape, seed=7 + n).to(result.dtype) for n, result in enumerate(smooth)]
    if smooth:
        torch.autograd.backward(smooth, upstream)
    gradients = [leaf.grad for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [*results, *(grad for grad in gradients if grad is not None)]


def same(operation: str, exact: Callable[..., Any], inputs: list[Any]) -> None:
    assert moe_kernels.chosen(torch.device("cpu"))[operation] == BACKEND
    dtype = next(value.dtype for value in inputs if isinstance(value, Tensor) and value.is_floating_point())
    ours = outputs_and_gradients(getattr(moe_kernels, operation), inputs)
    theirs = outputs_and_gradients(exact, inputs, FP64)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert distance(mine, other) <= TOLERANCE[dtype]


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


STREAMS = [(1, 4, 256), (33, 4, 40), (100, 1, 7), (5, 8, 33), (70, 3, 17), (300, 2, 64), (0, 4, 8), (17, 5, 1)]


@pytest.mark.parametrize("shape", STREAMS, ids=str)
def test_hyper_read(shape: tuple[int, int, int]) -> None:
    same("hyper_read", hyper_connection.hyper_read, read_inputs(*shape))


@pytest.mark.parametrize("shape", STREAMS, ids=str)
def test_hyper_write(shape: tuple[int, int, int]) -> None:
    same("hyper_write", hyper_connection.hyper_write, write_inputs(*shape))


@pytest.mark.parametrize("shape", STREAMS, ids=str)
def test_hyper_head(shape: tuple[int, int, int]) -> None:
    same("hyper_head", hyper_connection.hyper_head, head_inputs(*shape))


def test_hyper_connections_of_views_of_many_streams_and_of_float64() -> None:
    x, *others = read_inputs(9, 4, 16)
    same("hyper_read", hyper_connection.hyper_read, [x.transpose(0, 1).contiguous().transpose(0, 1), *others])
    wide = read_inputs(2, 9, 4)
    assert torch.equal(moe_kernels.hyper_read(*wide)[0], hyper_connection.hyper_read(*wide)[0])
    exact = [value.double() if isinstance(value, Tensor) else value for value in read_inputs(2, 4, 4)]
    assert moe_kernels.hyper_read(*exact)[0].dtype == FP64


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


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 512, 4, 64, 128, 64), (1, 5, 3, 7, 2, 4), (2, 33, 2, 20, 0, 16), (3, 100, 5, 24, 37, 8), (2, 1, 4, 8, 1, 16),
     (1, 600, 64, 16, 33, 128), (2, 70, 3, 9, 21, 5)],
    ids=str,
)  # fmt: skip
def test_window_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    same("window_attention", window_attention.window_attention, attention_inputs(*shape, dtype=dtype))


def test_window_attention_with_one_mask_for_all_rows_and_under_autocast() -> None:
    q, kv, entries, sinks, near, visible = attention_inputs(2, 40, 2, 8, 10, 8)
    inputs = [q, kv, entries, sinks, near[:1], visible]
    same("window_attention", window_attention.window_attention, inputs)
    with torch.autocast("cpu", dtype=BF16):
        ours = moe_kernels.window_attention(*inputs)[0]
    assert ours.dtype == BF16
    assert distance(ours, window_attention.window_attention(*inputs)[0].double()) <= TOLERANCE[BF16]


def causal_inputs(
    rows: int, queries: int, keys: int, heads: int, width: int, values: int, dtype: torch.dtype = FP32
) -> list[Any]:
    """Documents of about 20 tokens; one of them goes on after another has come between."""
    documents = (random(rows, keys, seed=4) > 1.6).cumsum(dim=1) % 5
    tensors = [random(rows, queries, heads, width), random(rows, keys, heads, width), random(rows, keys, heads, values)]
    return [*(tensor.to(dtype) for tensor in tensors), width**-0.5, documents]


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 130, 130, 3, 48, 32), (1, 1, 1, 1, 5, 3), (2, 7, 90, 2, 20, 20), (3, 75, 75, 1, 33, 7), (0, 4, 4, 2, 8, 8),
     (1, 40, 5500, 1, 16, 16)],
    ids=str,
)  # fmt: skip
def test_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = causal_inputs(*shape, dtype=dtype)
    same("attention", attention.attention, inputs)
    same("attention", attention.attention, inputs[:-1])


def test_attention_of_views_that_are_not_contiguous() -> None:
    q, k, v, *others = causal_inputs(2, 50, 50, 3, 16, 16)
    both = torch.cat([k, v], dim=-1)
    same(
        "attention", attention.attention, [q.transpose(1, 2).contiguous().transpose(1, 2), *both.chunk(2, -1), *others]
    )


def expert_inputs(tokens: int, width: int, inner: int, count: int, top_k: int, dtype: torch.dtype = FP32) -> list[Any]:
    gate_up, down = random(count, 2 * inner, width) * width**-0.5, random(count, width, inner) * inner**-0.5
    chosen, weights = chosen_experts(tokens, count, top_k), random(tokens, top_k).abs()
    return [random(tokens, width).to(dtype), chosen, weights, gate_up.to(dtype), down.to(dtype)]


def chosen_experts(tokens: int, count: int, top_k: int) -> Tensor:
    """The last expert gets no token."""
    scores = torch.rand(tokens, count - 1, generator=torch.Generator().manual_seed(tokens))
    return scores.argsort(dim=1)[:, :top_k].contiguous()


@DTYPES
@pytest.mark.parametrize(
    "shape", [(0, 8, 5, 4, 1), (1, 32, 16, 4, 3), (33, 12, 8, 7, 3), (5, 7, 3, 40, 2), (256, 64, 48, 9, 4)], ids=str
)
def test_experts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = expert_inputs(*shape, dtype=dtype)
    same("experts", experts.experts, inputs)
    assert not outputs_and_gradients(moe_kernels.experts, inputs)[-1][-1].any()


def test_experts_with_a_limit_and_views_that_are_not_contiguous() -> None:
    x, chosen, weights, gate_up, down = expert_inputs(40, 12, 8, 7, 3)
    turned = gate_up.transpose(0, 1).contiguous().transpose(0, 1)
    same("experts", experts.experts, [x, chosen, weights.t().contiguous().t(), turned, down, 0.4])


def test_experts_of_fp32_weights_under_autocast_and_as_many_rows_as_no_shape_before() -> None:
    """Rows of an expert are filled up before they are multiplied: what fills them up must not be seen."""
    for tokens in (37, 211, 700):
        inputs = expert_inputs(tokens, 24, 20, 5, 2)

        def ours(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return moe_kernels.experts(*tensors).float()

        mine = outputs_and_gradients(ours, inputs)
        theirs = outputs_and_gradients(experts.experts, inputs, FP64)
        assert [tensor.dtype for tensor in mine] == [FP32] * 5
        assert max(distance(a, b) for a, b in zip(mine, theirs, strict=True)) <= TOLERANCE[BF16]


def test_an_expert_that_does_not_exist_is_refused() -> None:
    x, chosen, *others = expert_inputs(3, 4, 4, 4, 2)
    with pytest.raises(RuntimeError, match="expert 4 does not exist"):
        moe_kernels.experts(x, chosen + 2, *others)


ROUTERS = [
    (700, 24, 64, 6, 1, 1),
    (33, 12, 16, 3, 4, 2),
    (5, 8, 7, 7, 1, 1),
    (40, 16, 256, 8, 8, 4),
    (0, 8, 4, 2, 1, 1),
]


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("given", [False, True], ids=["chosen", "given"])
@pytest.mark.parametrize("shape", ROUTERS, ids=str)
def test_route(shape: tuple[int, ...], given: bool, score: str) -> None:
    tokens, width, count, top_k, groups, top_groups = shape
    bias = None if given else random(count, seed=3) * 0.1
    chosen = torch.rand(tokens, count, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :top_k]
    inputs = [random(tokens, width), random(count, width) * width**-0.5, random(tokens, count), random(tokens, count)]

    def dense(x: Tensor, weight: Tensor, spread: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        """The choice as a table; every weight and every affinity has a gradient of its own."""
        how = {"score": score, "groups": groups, "top_groups": top_groups, "scale": 2.5}
        more = {"chosen_TK": chosen if given else None, "normalise": top_k > 2}
        indices, weights, scores = moe_kernels.route(x, weight, bias, top_k, **how, **more)
        table = torch.zeros_like(scores).scatter(1, indices, weights)
        return table.detach(), scores, (table * spread).sum() + (scores * own).sum()

    assert moe_kernels.chosen(torch.device("cpu"))["route"] == BACKEND
    ours = outputs_and_gradients(dense, inputs)
    with moe_kernels.reference_only():
        theirs = outputs_and_gradients(dense, inputs)
    assert torch.equal(ours[0] != 0, theirs[0] != 0) and len(ours) == len(theirs) == 7
    assert max(distance(mine, other.double()) for mine, other in zip(ours, theirs, strict=True)) <= TOLERANCE[FP32]


def test_route_takes_the_first_of_equal_experts_and_large_logits() -> None:
    x = torch.tensor([[0.0], [1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [300.0], [0.0], [-300.0], [0.0]])
    for score in ("sigmoid", "sqrt_softplus"):
        indices, weights, scores = moe_kernels.route(x, weight, torch.zeros(5), 3, score=score, normalise=False)
        assert indices.tolist() == [[0, 1, 2], [1, 0, 2], [3, 0, 2]]
        (weights.sum() + scores.sum()).backward()
        assert x.grad.isfinite().all() and scores.max().item() == pytest.approx(1.0 if score == "sigmoid" else 300**0.5)


def test_a_router_refuses_what_does_not_exist() -> None:
    x, weight = random(3, 4), random(6, 4)
    with pytest.raises(RuntimeError, match="expert 6 does not exist"):
        moe_kernels.route(x, weight, None, 1, chosen_TK=torch.full((3, 1), 6))
    with pytest.raises(RuntimeError, match="cannot take 7 of 6 experts"):
        moe_kernels.route(x, weight, torch.zeros(6), 7)
    with pytest.raises(RuntimeError, match="expert 6 does not exist"):
        moe_kernels.balance(torch.full((3, 1), 6), random(3, 6).sigmoid(), torch.zeros(1, 3, dtype=torch.int64))


def balance_inputs(rows: int, length: int, count: int, top_k: int, padded: bool) -> list[Any]:
    """Documents of about eight tokens."""
    starts, places = random(rows, length, seed=1) > 1.2, torch.arange(length)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    chosen = chosen_experts(rows * length, count, top_k)
    real = random(rows, length, seed=2) > -0.7 if padded else None
    return [chosen, random(rows * length, count).sigmoid(), first, real]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "shape", [(4, 200, 64, 6), (1, 1, 3, 1), (3, 17, 9, 8), (2, 40, 130, 2), (0, 5, 4, 2)], ids=str
)
def test_balance(shape: tuple[int, ...], padded: bool) -> None:
    inputs = balance_inputs(*shape, padded=padded)
    same("balance", balance.balance, inputs)
    assert moe_kernels.balance(*inputs)[0][-1] == 0


def test_balance_of_nothing_but_padding_is_zero() -> None:
    indices, scores, first, _ = balance_inputs(2, 9, 5, 2, padded=False)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    load, entropy, loss = moe_kernels.balance(indices, scores.requires_grad_(), first, nothing)
    loss.backward()
    assert not load.any() and not scores.grad.any() and (entropy, loss) == (0, 0)


def index_inputs(rows: int, tokens: int, heads: int, channels: int, entries: int, dtype: torch.dtype) -> list[Any]:
    """Entries of four tokens, some of which are hidden from all, as those of another document are."""
    tensors = [random(rows, tokens, heads, channels, dtype=dtype), random(rows, tokens, heads)]
    visible = (torch.arange(entries) * 4 + 3 <= torch.arange(tokens)[:, None]) & (torch.arange(entries) % 7 != 2)
    return [*tensors, random(rows, entries, channels, dtype=dtype), visible.expand(rows, -1, -1)]


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 150, 8, 32, 37), (1, 1100, 2, 16, 275), (1, 9, 70, 24, 2), (2, 40, 1, 2, 3), (1, 3, 2, 6, 5), (2, 4, 3, 5, 0)],
    ids=str,
)
def test_index_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = index_inputs(*shape, dtype=dtype)
    assert moe_kernels.chosen(torch.device("cpu"))["index_scores"] == BACKEND
    visible = inputs[3]
    ours, theirs = (
        outputs_and_gradients(lambda *given, call=call: call(*given).masked_fill(~visible, 0.0), inputs, exact)
        for call, exact in ((moe_kernels.index_scores, None), (index_scores.index_scores, FP64))
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert distance(mine, other) <= TOLERANCE[FP32 if mine.dtype is FP32 else dtype]
    assert (moe_kernels.index_scores(*inputs)[~visible] == -1e30).all()


LAYERS = [(1, 8, 6), (32, 1, 1), (33, 7, 5), (65, 24, 40), (700, 66, 100), (530, 1100, 70), (50, 48, 1200), (0, 4, 6)]


@DTYPES
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    weight = random(outputs, inputs, dtype=dtype) * inputs**-0.5
    same("linear", F.linear, [random(rows, inputs, dtype=dtype), weight])
    same("linear", F.linear, [random(3, inputs, rows, dtype=dtype).mT, weight])


def test_linear_under_autocast_takes_fp32_weights_and_gives_fp32_gradients() -> None:
    def ours(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return moe_kernels.linear(*inputs)

    for rows in (5, 90):
        inputs = [random(rows, 64), random(48, 64) / 8]
        mine, theirs = outputs_and_gradients(ours, inputs), outputs_and_gradients(F.linear, inputs, FP64)
        assert [tensor.dtype for tensor in mine] == [BF16, FP32, FP32]
        assert max(distance(a, b) for a, b in zip(mine, theirs, strict=True)) <= TOLERANCE[BF16]


def test_linear_computes_the_gradients_that_are_wanted() -> None:
    x, weight = random(40, 6), random(8, 6)
    for wanted in ((True, False), (False, True)):
        leaves = [value.clone().requires_grad_(want) for value, want in zip((x, weight), wanted, strict=True)]
        moe_kernels.linear(*leaves).sum().backward()
        assert tuple(leaf.grad is not None for leaf in leaves) == wanted
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        moe_kernels.linear(x, random(8, 7))


@DTYPES
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("shape", [(1, 24), (9, 2, 38), (0, 6), (300, 512)], ids=str)
def test_swiglu(shape: tuple[int, ...], limit: float | None, dtype: torch.dtype) -> None:
    same("swiglu", swiglu.swiglu, [random(*shape, dtype=dtype), limit])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 32), (5, 7, 33), (0, 8), (700, 64), (3, 5)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    exact = lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps)  # noqa: E731
    same("rms_norm", exact, [random(*shape, dtype=dtype), random(shape[-1]), 1e-6])
    same("rms_norm", exact, [random(*shape, dtype=dtype), None, 1e-6])


def test_rms_norm_of_a_view_that_is_not_contiguous() -> None:
    exact = lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps)  # noqa: E731
    same("rms_norm", exact, [random(33, 6).t(), random(33), 1e-5])


def angles(rows: int, length: int, channels: int) -> tuple[Tensor, Tensor]:
    turns = random(rows, length, 1, channels // 2, seed=5) * 3
    return turns.cos(), turns.sin()


@DTYPES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 1, 8, 8), (3, 40, 2, 20, 6), (2, 1, 3, 64, 16), (0, 3, 1, 4, 2)], ids=str)
def test_rotate(shape: tuple[int, ...], inverse: bool, dtype: torch.dtype) -> None:
    """A pair of channels is a complex number, and a rotation its product with another."""
    *outer, channels = shape
    for rows in {1, outer[0]}:
        cosine, sine = angles(rows, outer[1], channels)

        def exact(x: Tensor, cosine: Tensor = cosine, sine: Tensor = sine) -> Tensor:
            turn = torch.complex(cosine.double(), -sine.double() if inverse else sine.double())
            kept, turned = x.split([x.shape[-1] - channels, channels], dim=-1)
            pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
            return torch.cat([kept, torch.view_as_real(pairs * turn).flatten(-2)], dim=-1)

        ours = outputs_and_gradients(
            lambda x, c=cosine, s=sine: moe_kernels.rotate(x, c, s, inverse), [random(*outer, dtype=dtype)]
        )
        theirs = outputs_and_gradients(exact, [random(*outer, dtype=dtype)], FP64)
        assert moe_kernels.chosen(torch.device("cpu"))["rotate"] == BACKEND
        assert max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True)) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize(("tokens", "words"), [(1, 1), (7, 33), (40, 4096), (5, 16), (0, 8)])
def test_cross_entropy(tokens: int, words: int, dtype: torch.dtype) -> None:
    logits, scale = random(tokens, words, dtype=dtype) * 4, torch.tensor(0.3)
    targets = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(0))
    targets[1::3] = -100
    losses, gradient = moe_kernels.cross_entropy_with_gradient(logits, targets, scale)
    exact = logits.double().requires_grad_()
    theirs = F.cross_entropy(exact, targets, reduction="none")
    (theirs.sum() * scale).backward()
    assert (losses.dtype, gradient.dtype) == (FP32, dtype)
    assert distance(losses, theirs) <= TOLERANCE[FP32]
    assert distance(gradient, exact.grad) <= TOLERANCE[dtype]
    logits.requires_grad_()
    alone = moe_kernels.cross_entropy(logits, targets)
    (alone.sum() * scale).backward()
    assert moe_kernels.chosen(torch.device("cpu"))["cross_entropy"] == BACKEND and torch.equal(alone, losses)
    assert distance(logits.grad, exact.grad) <= TOLERANCE[dtype]
    for call in (moe_kernels.cross_entropy, partial(moe_kernels.cross_entropy_with_gradient, scale=scale)):
        with pytest.raises(RuntimeError, match="there is no word 99999"):
            call(random(1, words), torch.tensor([99999]))


MATRICES = [(3, 128, 256), (2, 256, 128), (1, 7, 5), (2, 70, 33), (1, 300, 300), (4, 1, 9), (0, 4, 4)]


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_newton_schulz_in_bfloat16(shape: tuple[int, int, int]) -> None:
    x = random(*shape)
    for steps in (newton_schulz.COEFFICIENTS, newton_schulz.COEFFICIENTS[-3:]):
        exact = newton_schulz.newton_schulz(x.double(), steps)
        ours = moe_kernels.newton_schulz(x, steps, BF16)
        assert moe_kernels.chosen(torch.device("cpu"))["newton_schulz"] == BACKEND
        assert ours.dtype is FP32 and distance(ours, exact) <= 2e-2
        assert distance(moe_kernels.newton_schulz(x.bfloat16(), steps), exact) <= 2e-2


ENDS = [(newton_schulz.COEFFICIENTS, 0.95, 1.05), (newton_schulz.POLAR_EXPRESS, 0.8, 1.15)]
SCHEDULES = pytest.mark.parametrize(("steps", "least", "most"), ENDS, ids=["deepseek-v4", "polar-express"])


@SCHEDULES
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e9])
def test_newton_schulz_stays_bounded_where_singular_values_vanish(scale: float, steps, least, most) -> None:
    x = scale * (random(2, 96, 4) @ random(2, 4, 200) + 1e-4 * random(2, 96, 200))
    values = torch.linalg.svdvals(moe_kernels.newton_schulz(x, steps, BF16))
    assert values.max() <= most
    assert (values[:, :4] > least).all() or scale == 0


@SCHEDULES
def test_newton_schulz_stays_bounded_where_one_row_has_nearly_all(steps, least, most) -> None:
    values = torch.tensor([1.0, 3e-2, 7e-3, 6e-4, 5e-5, 1e-5, 0.0, 0.0])
    for seed in range(40):
        turned, directions = (torch.linalg.qr(random(n, 8, seed=seed))[0] for n in (8, 64))
        near_its_own = torch.linalg.qr(torch.eye(8) + 0.1 * turned)[0]
        x = (near_its_own * values) @ directions.T
        largest = torch.linalg.matrix_norm(moe_kernels.newton_schulz(x[None], steps, BF16), 2)
        assert least <= largest <= most


def test_newton_schulz_has_the_same_bits_with_two_threads(threads: Callable[[int], None]) -> None:
    runs = []
    for count in (1, 2):
        threads(count)
        runs.append(moe_kernels.newton_schulz(random(5, 40, 24), dtype=BF16))
    assert torch.equal(*runs)


def test_newton_schulz_is_what_torch_library_expects() -> None:
    torch.library.opcheck(torch.ops.moe_kernels_cpu.newton_schulz.default, (random(2, 6, 9), [2.0, -1.5, 0.5], 1e-15))


@DTYPES
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    broken = random(40, 48, dtype=dtype)
    broken[3, 5] = torch.nan
    for limit in (None, 0.5):
        assert moe_kernels.swiglu(broken, limit).isnan().nonzero().tolist() == [[3, 5]]
    assert moe_kernels.linear(broken, random(6, 48, dtype=dtype)).isnan().any(dim=1).nonzero().tolist() == [[3]]
    q, k, v, *others = causal_inputs(1, 9, 9, 1, 24, 16)
    k[0, 4] = torch.nan
    out = moe_kernels.attention(*(tensor.to(dtype) for tensor in (q, k, v)), others[0], None)
    assert out[0, 4:].isnan().all()
    q, weights, keys, visible = index_inputs(1, 9, 2, 8, 2, dtype)
    keys[0, 1] = torch.nan
    scores = moe_kernels.index_scores(q, weights, keys, visible)
    assert visible[..., 1].any() and torch.equal(scores.isnan(), visible & torch.tensor([False, True]))


def rotate_inputs() -> list[Any]:
    return [random(2, 90, 3, 24), *angles(2, 90, 8)]


CASES = {
    "attention": causal_inputs(2, 150, 150, 2, 24, 16),
    "balance": balance_inputs(3, 90, 20, 4, padded=True),
    "cross_entropy": [random(60, 48), torch.arange(60) % 48, -100],
    "cross_entropy_with_gradient": [random(60, 48), torch.arange(60) % 48, torch.tensor(0.5), -100],
    "experts": [*expert_inputs(300, 16, 12, 6, 2), 0.5],
    "hyper_head": head_inputs(900, 4, 48),
    "hyper_read": read_inputs(900, 4, 48),
    "hyper_write": write_inputs(900, 4, 48),
    "index_scores": index_inputs(2, 300, 8, 16, 75, FP32),
    "linear": [random(1100, 48), random(70, 48)],
    "rms_norm": [random(900, 48), random(48), 1e-6],
    "rotate": [*rotate_inputs(), True],
    "route": [random(900, 24), random(16, 24), random(16), 3],
    "swiglu": [random(900, 48), 0.5],
    "window_attention": attention_inputs(2, 600, 2, 16, 40, 32),
}
FIXED = {"rotate": (1, 2), "cross_entropy_with_gradient": (0, 2), "route": (1,)}  # inputs that have no gradient
OPERANDS = CASES | {"route": [random(90, 16), random(16), None, 3, False, 4, 2, True, 2.5]}  # of the operators


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("operation", CASES)
def test_the_same_bits_again_and_with_two_threads(operation: str, threads: Callable[[int], None]) -> None:
    runs = []
    for count in (1, 1, 2):
        threads(count)
        runs.append(outputs_and_gradients(getattr(moe_kernels, operation), CASES[operation]))
    for first, again, two in zip(*runs, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, two)


@pytest.mark.parametrize("operation", CASES)
def test_what_torch_library_expects(operation: str) -> None:
    leaves = [
        value.clone().requires_grad_(place not in FIXED.get(operation, ()))
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for place, value in enumerate(OPERANDS[operation])
    ]
    torch.library.opcheck(getattr(torch.ops.moe_kernels_cpu, operation).default, tuple(leaves))


@pytest.mark.parametrize("operation", CASES)
def test_a_compiled_graph_holds_the_operation_whole_and_keeps_its_values(operation: str) -> None:
    call = getattr(moe_kernels, operation)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    pairs = zip(*(outputs_and_gradients(each, CASES[operation]) for each in (compiled, call)), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_training_keeps_its_losses() -> None:
    """Twenty steps of the demo's kinds of layers in float32; at the demo's rate any rounding error grows past 1e-5."""
    config = ModelConfig.preset("demo").replace(hidden_size=64, moe_intermediate_size=32, vocab_size=512)
    ids = torch.randint(0, 512, (1, 129), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(128) // 50)[None]

    def losses() -> list[float]:
        net = build(config, seed=0).train()
        optimizer, found = adamw(net, 1e-4, 0.1), []
        for _ in range(20):
            loss = sum(losses_of(net, ids[:, :-1], ids[:, 1:], documents, sparse=True)[0].values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    ours = losses()
    with moe_kernels.reference_only():
        theirs = losses()
    assert theirs[-1] < theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5
