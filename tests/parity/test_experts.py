"""The grouped expert layer against a float64 loop over tokens."""

from collections.abc import Iterator

import pytest
import torch
from moe_kernels import experts, reference_only
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with reference_only():
        yield


def loop(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    limit: float | None = None,
) -> torch.Tensor:
    high = torch.inf if limit is None else limit
    rows = []
    for token, chosen, scales in zip(x, indices, weights, strict=True):
        gates_ups = [(gate_up[e] @ token).chunk(2) for e in chosen]
        cut = [(g.clamp(max=high), u.clamp(-high, high)) for g, u in gates_ups]
        outputs = [down[e] @ (F.silu(g) * u) for e, (g, u) in zip(chosen, cut, strict=True)]
        rows.append(sum(s * y for s, y in zip(scales, outputs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_values_and_gradients(tokens: int, top_k: int, limit: float | None) -> None:
    random = torch.Generator().manual_seed(tokens * 10 + top_k)
    make = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    inputs = [make(tokens, 12), make(tokens, top_k).abs(), make(7, 16, 12), make(7, 12, 8)]
    indices = torch.stack([torch.randperm(6, generator=random)[:top_k] for _ in range(tokens)])  # expert 6 stays empty
    upstream = make(tokens, 12)

    theirs = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = loop(theirs[0], indices, *theirs[1:], limit)
    expected.backward(upstream)
    ours = [tensor.float().requires_grad_() for tensor in inputs]
    actual = experts(ours[0], indices, *ours[1:], limit)
    actual.backward(upstream.float())

    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
    assert not ours[2].grad[6].any()


def test_bfloat16_autocast_stays_close() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(64, 32), torch.randn(8, 48, 32) * 0.2, torch.randn(8, 32, 24) * 0.2
    indices, weights = torch.randn(64, 8).topk(2).indices, torch.rand(64, 2)
    exact = experts(x, indices, weights, gate_up, down)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = experts(x, indices, weights, gate_up, down)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() <= 0.02 * exact.norm()


def arguments(device: str = "cpu") -> list[torch.Tensor]:
    x, weights, gate_up, down = torch.randn(9, 12), torch.rand(9, 2), torch.randn(5, 16, 12), torch.randn(5, 12, 8)
    indices = torch.rand(9, 5).topk(2).indices
    return [
        tensor.to(device).requires_grad_(tensor.is_floating_point()) for tensor in (x, indices, weights, gate_up, down)
    ]


def test_shapes_gradients_and_schema_are_what_torch_library_expects() -> None:
    for limit in (None, 0.5):
        torch.library.opcheck(torch.ops.moe_kernels.experts.default, (*arguments(), limit))


def test_the_meta_device_carries_shapes_through_both_passes() -> None:
    inputs = arguments("meta")
    experts(*inputs).sum().backward()
    assert [t.grad.shape if t.grad is not None else None for t in inputs] == [
        (9, 12), None, (9, 2), (5, 16, 12), (5, 12, 8),
    ]  # fmt: skip


def test_a_compiled_graph_holds_the_layer_whole_and_keeps_its_values() -> None:
    inputs = arguments()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), experts(*inputs))
