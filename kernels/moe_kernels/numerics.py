"""How far each operation on a device is from the reference: inputs, tolerances and the comparison.

Each case runs forward and backward on the device in fp32 or bf16, and on the CPU by the reference with the very same
numbers in fp64 (an operation that works in fp32 by its definition does so there too). The error is the norm of the
difference over the norm of the reference, which counts as at least 0.01 an element, of every result and gradient.

Shapes: T tokens, D hidden size, H heads, E experts, K experts per token, F width of an expert, N routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moe_kernels

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = (FP32, BF16)
USUAL = {FP32: 2e-5, BF16: 2e-2}
TOLERANCE = {
    "newton_schulz": {FP32: 1e-4, BF16: 1e-1},  # ten steps of products on each other's results
    "experts": {FP32: 2e-5, BF16: 5e-2},  # a value that rounding moves across the limit loses its gradient
    "window_attention": {FP32: 2e-5, BF16: 4e-2},  # exponents of size 20
}
FP32_ONLY = {"adamw_step", "hyper_head", "hyper_read", "hyper_write"}  # whatever the autocast
FP32_ONLY |= {"balance", "expert_load", "route"}
FP32_ONLY |= {"decode_compressed_attention", "decode_experts", "decode_latent_attention", "skinny_linear"}


@dataclass(frozen=True)
class Case:
    """One call: what is special about it, the function, and its inputs in fp32; floating-point ones get gradients."""

    name: str
    call: Callable[..., Any]
    inputs: list[Any]


@dataclass(frozen=True)
class Worst:
    """The largest error, of which case and which result, and there the element that is furthest off."""

    error: float
    case: str
    result: str
    shape: list[int]
    at: list[int]
    found: float
    expected: float


def dtypes(operation: str) -> tuple[torch.dtype, ...]:
    """Those in which an operation is used."""
    return DTYPES[:1] if operation in FP32_ONLY else DTYPES


def tolerance(operation: str, dtype: torch.dtype) -> float:
    return TOLERANCE.get(operation, USUAL)[dtype]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def compare(operation: str, dtype: torch.dtype, device: torch.device) -> tuple[Worst, int]:
    """(the worst of all cases of an operation on `device`, how many cases); what cannot run is infinitely wrong."""
    found, cases = [], CASES[operation]()
    for case in cases:
        moved = [cast(value, dtype) for value in case.inputs]
        with moe_kernels.reference_only():
            theirs = results(case.call, [cast(value, torch.float64) for value in moved])
        try:
            ours = {
                name: value.cpu() for name, value in results(case.call, [to_device(x, device) for x in moved]).items()
            }
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            found.append(Worst(float("inf"), case.name, f"error: {reason}", [], [], float("nan"), float("nan")))
        else:
            found += [worst(case.name, name, ours.get(name), theirs[name]) for name in theirs]
    return max(found, key=lambda one: one.error), len(cases)


def results(call: Callable[..., Any], inputs: list[Any]) -> dict[str, Tensor]:
    """Results of a call and gradients of its floating-point inputs, by name; the same upstream gradients everywhere."""
    leaves = [_leaf(value) for value in inputs]
    out = call(*leaves)
    named = {f"result {n}": value for n, value in enumerate(out if isinstance(out, tuple) else (out,))}
    smooth = [value for value in named.values() if value.requires_grad]
    upstream = [random(*value.shape, seed=7 + n).to(value) for n, value in enumerate(smooth)]
    if smooth:
        torch.autograd.backward(smooth, upstream)
    gradients = {
        f"gradient of input {n}": leaf.grad
        for n, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.grad is not None
    }
    return named | gradients


def worst(case: str, result: str, ours: Tensor | None, theirs: Tensor) -> Worst:
    """The error of one result; one that is missing, not finite or of another shape is infinitely wrong."""
    if ours is None or ours.shape != theirs.shape:
        return Worst(float("inf"), case, result, list(theirs.shape), [], float("nan"), float("nan"))
    mine, exact = (tensor.detach().cpu().double() for tensor in (ours, theirs))
    difference = mine - exact
    error = float(difference.norm() / exact.norm().clamp(min=1e-2 * max(exact.numel(), 1) ** 0.5))
    place = int(difference.nan_to_num(torch.inf).abs().argmax()) if exact.numel() else 0
    at = [int(index) for index in torch.unravel_index(torch.tensor(place), exact.shape)] if exact.numel() else []
    values = [float(tensor.flatten()[place]) if exact.numel() else 0.0 for tensor in (mine, exact)]
    return Worst(error if error == error else float("inf"), case, result, list(exact.shape), at, *values)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in that dtype, its strides kept; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor on that device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def _rms_norm() -> list[Case]:
    call = lambda x, weight: moe_kernels.rms_norm(x, weight, 1e-6)  # noqa: E731
    plain = lambda x: moe_kernels.rms_norm(x, None, 1e-6)  # noqa: E731
    return [
        Case("33 rows of 256", call, [random(33, 256), random(256)]),
        Case("one row", call, [random(1, 64), random(64)]),
        Case(
            "rows of size 1e4 and 1e-4",
            call,
            [random(2, 64) * torch.tensor([[1e4], [1e-4]]), random(64)],
        ),
        Case("a view that is not contiguous", call, [random(32, 6).t(), random(32)]),
        Case("no weight", plain, [random(2, 3, 4, 16)]),
    ]


def _rotate() -> list[Case]:
    turns = torch.rand(1, 9, 1, 4, generator=torch.Generator().manual_seed(1)) * 6.28
    tables = turns.cos(), turns.sin()

    def call(inverse: bool) -> Callable[[Tensor], Tensor]:
        def rotate(x: Tensor) -> Tensor:
            return moe_kernels.rotate(x, *(table.to(x.device) for table in tables), inverse)

        return rotate

    return [
        Case("all channels", call(False), [random(2, 9, 3, 8)]),
        Case("the last channels, backwards", call(True), [random(2, 9, 3, 20)]),
    ]


def _swiglu() -> list[Case]:
    clamped = lambda x: moe_kernels.swiglu(x, 0.7)  # noqa: E731
    return [
        Case("33 rows", moe_kernels.swiglu, [random(33, 96)]),
        Case("clamped", clamped, [random(9, 24) * 2]),
        Case("one row of large values", moe_kernels.swiglu, [random(1, 24) * 30]),
    ]


def _indices(tokens: int, top_k: int, used: int) -> Tensor:
    """Distinct unsorted experts per token, from the first `used`."""
    scores = torch.rand(tokens, used, generator=torch.Generator().manual_seed(tokens))
    return scores.argsort(dim=1)[:, :top_k].contiguous()


def _route() -> list[Case]:
    def call(chosen: Tensor | None = None, **more: Any) -> Callable[[Tensor, Tensor], Any]:
        def route(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            bias = random(16, seed=2).to(x) * 0.1 if chosen is None else None
            given = None if chosen is None else chosen.to(x.device)
            indices, weights, scores = moe_kernels.route(x, weight, bias, 3, chosen_TK=given, scale=2.5, **more)
            order = indices.argsort(dim=1)
            return indices.gather(1, order), weights.gather(1, order), scores

        return route

    inputs = [random(40, 32), random(16, 32)]
    return [
        Case("sigmoid", call(), inputs),
        Case("sigmoid, 2 of 4 groups", call(groups=4, top_groups=2), inputs),
        Case("square root of softplus", call(score="sqrt_softplus"), inputs),
        Case("experts that are given", call(_indices(40, 3, 16), score="sqrt_softplus"), inputs),
    ]


def _balance() -> list[Case]:
    def call(indices: Tensor, scores: Tensor, first: Tensor, *real: Tensor) -> tuple[Tensor, ...]:
        load, *others = moe_kernels.balance(indices, scores, first, *real)
        return load.double(), *others

    first = torch.tensor([[0] * 7 + [7] * 5, [0] * 12])
    inputs = [_indices(24, 3, 8), random(24, 9).sigmoid(), first]
    return [Case("documents", call, inputs), Case("padding", call, [*inputs, torch.arange(24).view(2, 12) % 5 > 0])]


def _expert_load() -> list[Case]:
    return [Case("an expert without tokens", lambda i: moe_kernels.expert_load(i, 7).double(), [_indices(13, 3, 6)])]


def _permute() -> list[Case]:
    def call(x: Tensor, indices: Tensor) -> Tensor:
        return moe_kernels.permute(x, indices, 7)[0]

    shapes = ((1, 1), (13, 3), (64, 2))
    return [Case(f"{t} tokens, top {k}", call, [random(t, 8), _indices(t, k, 6)]) for t, k in shapes]


def _unpermute() -> list[Case]:
    def case(tokens: int, top_k: int) -> Case:
        places = moe_kernels.permute(random(tokens, 8), _indices(tokens, top_k, 6), 7)[1].to(torch.int32)
        inputs = [random(tokens * top_k, 8), places, random(tokens, top_k).abs()]
        return Case(f"{tokens} tokens, top {top_k}", moe_kernels.unpermute, inputs)

    return [case(1, 1), case(13, 3)]


def _grouped_matmul() -> list[Case]:
    counts = ([3, 0, 5, 1], [0, 0, 0, 9], [1, 0, 0, 0])
    weight = random(4, 6, 8)
    return [Case(f"rows {c}", moe_kernels.grouped_matmul, [random(sum(c), 8), weight, torch.tensor(c)]) for c in counts]


def _experts() -> list[Case]:
    def case(tokens: int, top_k: int, limit: float | None) -> Case:
        call = lambda *inputs: moe_kernels.experts(*inputs, limit)  # noqa: E731
        inputs = [random(tokens, 32), _indices(tokens, top_k, 6), random(tokens, top_k).abs()]
        name = f"{tokens} tokens, top {top_k}, an expert without tokens{', clamped' if limit else ''}"
        return Case(name, call, [*inputs, random(7, 48, 32) * 0.3, random(7, 32, 24) * 0.3])

    return [case(1, 1, None), case(33, 3, None), case(100, 2, 0.7)]


def _attention() -> list[Case]:
    inputs = [random(2, 17, 3, 16), random(2, 17, 3, 16, seed=1), random(2, 17, 3, 8)]
    documents = (torch.arange(17) > 6).long().expand(2, -1).contiguous()
    return [
        Case("one document a row", lambda q, k, v: moe_kernels.attention(q, k, v, 0.25), inputs),
        Case("two documents a row", lambda q, k, v, d: moe_kernels.attention(q, k, v, 0.25, d), [*inputs, documents]),
    ]


def _cross_entropy() -> list[Case]:
    targets = torch.tensor([3, -100, 0, 63, 9])
    return [
        Case("one target that does not count", moe_kernels.cross_entropy, [random(5, 64), targets]),
        Case("logits of size 100", moe_kernels.cross_entropy, [random(5, 64) * 100, targets]),
    ]


def _cross_entropy_with_gradient() -> list[Case]:
    def call(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(0.25, device=logits.device)
        return moe_kernels.cross_entropy_with_gradient(logits.detach(), targets, scale)

    return [Case(case.name, call, case.inputs) for case in _cross_entropy()]


def _window_inputs(cached: bool) -> list[Any]:
    """30 tokens in chunks of 8, 5 entries of which a token sees those of its past."""
    rows, length, window, entries = 2, 30, 8, 5
    places = torch.arange(length)
    first = places - places if cached else places // window * window - window
    keys = first[:, None] + torch.arange(length if cached else 2 * window)
    near = (keys <= places[:, None]) & (keys > places[:, None] - window) & (keys >= 0)
    visible = torch.arange(entries) * 6 < places[:, None]
    tensors = [random(rows, length, 4, 16), random(rows, length, 16), random(rows, entries, 16), random(4)]
    return [*tensors, near.expand(rows, -1, -1), visible.expand(rows, -1, -1)]


def _window_attention() -> list[Case]:
    call = moe_kernels.window_attention
    small = _window_inputs(cached=False)
    return [Case("30 tokens", call, small), Case("queries of size 20", call, [small[0] * 20, *small[1:]])]


def _cached_window_attention() -> list[Case]:
    return [Case("30 tokens", moe_kernels.cached_window_attention, _window_inputs(cached=True))]


def _hyper_read() -> list[Case]:
    def case(tokens: int, streams: int, width: int) -> Case:
        count = streams * (streams + 2)
        call = lambda *inputs: moe_kernels.hyper_read(*inputs, 1e-6, 20, 1e-6)  # noqa: E731
        inputs = [random(tokens, streams, width), random(count, streams * width) * 0.1, random(count), random(3) + 1]
        return Case(f"{tokens} tokens, {streams} streams of {width}", call, inputs)

    return [case(33, 4, 40), case(1, 4, 64), case(70, 3, 17)]


def _hyper_write() -> list[Case]:
    def case(t: int, n: int, d: int) -> Case:
        inputs = [random(t, n, d), random(t, d), random(t, n), random(t, n, n)]
        return Case(f"{t} tokens, {n} streams of {d}", moe_kernels.hyper_write, inputs)

    return [case(33, 4, 40), case(70, 3, 17)]


def _hyper_head() -> list[Case]:
    def case(t: int, n: int, d: int) -> Case:
        call = lambda *inputs: moe_kernels.hyper_head(*inputs, 1e-6, 1e-6)  # noqa: E731
        inputs = [random(t, n, d), random(n, n * d) * 0.1, random(n), random(1) + 1]
        return Case(f"{t} tokens, {n} streams of {d}", call, inputs)

    return [case(1, 4, 64), case(70, 3, 17)]


def _plain(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same of copies and without gradients, as operations of a decoding step are called."""

    def run(*inputs: Any) -> Any:
        with torch.no_grad():
            return call(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))

    return run


def _linear() -> list[Case]:
    shapes = {"one row": (1, 8, 6), "70 rows, 24 to 40": (70, 24, 40), "33 rows, 7 to 5": (33, 7, 5)}
    wide = random(2, 20, 64), random(1100, 64) * 0.1
    narrow = [Case(name, moe_kernels.linear, [random(t, d), random(o, d)]) for name, (t, d, o) in shapes.items()]
    return [*narrow, Case("2 by 20 rows, 64 to 1,100", moe_kernels.linear, [*wide])]


def _skinny_linear() -> list[Case]:
    shapes = ((1, 64, 33), (2, 20, 7), (3, 17, 40), (18, 256, 130))
    call = _plain(moe_kernels.skinny_linear)
    return [Case(f"{t} rows, {d} to {o}", call, [random(t, d), random(o, d) * d**-0.5]) for t, d, o in shapes]


def _decode_experts() -> list[Case]:
    def case(name: str, tokens: int, given: bool = False, **how: Any) -> Case:
        def call(x: Tensor, router: Tensor, bias: Tensor, chosen: Tensor, *weights: Tensor) -> Tensor:
            first = (None, chosen) if given else (bias, None)
            return moe_kernels.decode_experts(x, router, *first, weights[:2], weights[2:], 3, scale=2.5, **how)

        routed = [random(8, 22, 20) * 0.3, random(8, 20, 11) * 0.3]
        shared = [random(13, 20) * 0.3, random(13, 20, seed=1) * 0.3, random(20, 13) * 0.3]
        inputs = [random(tokens, 20), random(8, 20), random(8) * 0.1, _indices(tokens, 3, 7), *routed, *shared]
        return Case(name, _plain(call), inputs)

    return [
        case("one row", 1),
        case("19 rows, 2 of 4 groups", 19, groups=4, top_groups=2),
        case("square root of softplus, clamped", 5, score="sqrt_softplus", limit=0.7, normalise=False),
        case("given experts", 3, given=True, score="sqrt_softplus"),
    ]


def _places() -> list[Tensor]:
    """Three rows: lengths and ends of two tokens, one, and two."""
    return [torch.tensor([9, 0, 21]), torch.tensor([11, 1, 23])]


def _past(slots: int, channels: int, seed: int = 0) -> list[Tensor]:
    """A cache that holds something everywhere, of three rows."""
    return [random(3, slots + 1, channels, seed=seed), torch.zeros(3, slots + 1, dtype=torch.int64)]


def _decode_latent_attention() -> list[Case]:
    def case(low_rank: bool) -> Case:
        def call(x: Tensor, lengths: Tensor, ends: Tensor, cache: Tensor, places: Tensor, *others: Tensor) -> Any:
            query = others[:3] if low_rank else others[2:3]
            frequencies = torch.tensor([1.0, 0.1, 0.01]).to(x)
            more = (others[3:6], others[6], cache, places, frequencies, 1.1, 0.3, 3)
            return moe_kernels.decode_latent_attention(x, lengths, ends, query, *more), cache

        query = [random(9, 20), random(9), random(3 * 11, 9 if low_rank else 20)]
        others = [*query, random(13, 20), random(7), random(3 * (5 + 4), 7), random(20, 12)]
        inputs = [random(3, 2, 20), *_places(), *_past(64, 13), *(weight * 0.5 for weight in others)]
        return Case(f"queries {'of low rank' if low_rank else 'of one matrix'}", _plain(call), inputs)

    return [case(True), case(False)]


def _decode_compressed_attention() -> list[Case]:
    """Three heads of 10 channels, a window of 7; an entry every 4 tokens, later more than are chosen, or every 6."""

    def case(name: str, compressed: list[Tensor], indexer: list[Tensor], caches: list[Tensor]) -> Case:
        sizes = (8, len(compressed), len(indexer), len(caches))

        def call(x: Tensor, lengths: Tensor, ends: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            weights, compression, indexing, cache = _split(rest, sizes)
            frequencies = torch.tensor([1.0, 0.1]).to(x)
            more = (weights, compression, indexing, cache, frequencies, 3, 3, 1e-6)
            return moe_kernels.decode_compressed_attention(x, lengths, ends, *more), *cache[::2]

        query, key = [random(9, 20), random(9), random(30, 9)], [random(10, 20), random(10)]
        weights = [*query, *key, random(3 * 5, 10), random(20, 15), random(3)]
        return Case(name, _plain(call), [random(3, 2, 20), *_places(), *weights, *compressed, *indexer, *caches])

    window, heavy = _past(7, 10), [random(10, 20), random(10, 20, seed=1), random(6, 10), random(10)]
    sparse = [random(20, 20), random(20, 20, seed=1), random(4, 20), random(10)]
    indexer = [random(12, 20), random(12, 20, seed=1), random(4, 12), random(6), random(2 * 6, 9), random(2, 20)]
    entries = [*_past(8, 40), *_past(64, 10, seed=1), *_past(8, 24), *_past(64, 6)]
    return [
        case("a window alone", [], [], window),
        case("an entry for six tokens", heavy, [], [*window, *_past(6, 20), *_past(64, 10, seed=1)]),
        case("chosen ones of overlapping entries", sparse, indexer, [*window, *entries]),
    ]


def _split(values: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[list[Tensor]]:
    """Neighbours in groups of those sizes."""
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return [list(values[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def _newton_schulz() -> list[Case]:
    wide, tall = ((random(3, *shape)) for shape in ((12, 20), (20, 12)))
    return [Case("wide", moe_kernels.newton_schulz, [wide]), Case("tall", moe_kernels.newton_schulz, [tall])]


def _index_scores() -> list[Case]:
    def case(rows: int, tokens: int, heads: int, channels: int, entries: int) -> Case:
        visible = (torch.arange(entries) * 4 + 3 <= torch.arange(tokens)[:, None]).expand(rows, -1, -1)
        inputs = [random(rows, tokens, heads, channels), random(rows, tokens, heads), random(rows, entries, channels)]
        return Case(f"{tokens} tokens, {entries} entries", moe_kernels.index_scores, [*inputs, visible])

    return [case(2, 70, 3, 16, 17), case(1, 5, 8, 24, 1)]


def _adamw_step() -> list[Case]:
    def call(weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        weights, gradients = [weight.detach().clone()], [gradient.detach()]
        state = moe_kernels.AdamWState(
            [torch.zeros_like(weights[0])], [torch.zeros_like(weights[0])], [weight.new_zeros((), dtype=FP32)]
        )
        for _ in range(3):
            moe_kernels.adamw_step(weights, gradients, state, moe_kernels.AdamW(1e-2, weight_decay=0.1))
        return weights[0], state.first[0], state.second[0]

    return [Case("three steps", call, [random(5, 7), random(5, 7, seed=9)])]


CASES: dict[str, Callable[[], list[Case]]] = {
    "adamw_step": _adamw_step,
    "attention": _attention,
    "balance": _balance,
    "cached_window_attention": _cached_window_attention,
    "cross_entropy": _cross_entropy,
    "cross_entropy_with_gradient": _cross_entropy_with_gradient,
    "decode_compressed_attention": _decode_compressed_attention,
    "decode_experts": _decode_experts,
    "decode_latent_attention": _decode_latent_attention,
    "expert_load": _expert_load,
    "experts": _experts,
    "grouped_matmul": _grouped_matmul,
    "hyper_head": _hyper_head,
    "hyper_read": _hyper_read,
    "hyper_write": _hyper_write,
    "index_scores": _index_scores,
    "linear": _linear,
    "newton_schulz": _newton_schulz,
    "permute": _permute,
    "rms_norm": _rms_norm,
    "rotate": _rotate,
    "route": _route,
    "skinny_linear": _skinny_linear,
    "swiglu": _swiglu,
    "unpermute": _unpermute,
    "window_attention": _window_attention,
}
