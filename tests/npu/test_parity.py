"""Each operation on `npu` against the reference on the CPU: values and the gradient of every input."""

from __future__ import annotations

from contextlib import nullcontext

import moe_kernels
import pytest
import torch
from cases import NPU, TOLERANCE, Case, angles, chosen_experts, distance, outputs_and_gradients, random
from moe_kernels import numerics

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def same(operation: str, case: Case, dtype: torch.dtype) -> None:
    assert moe_kernels.chosen(NPU)[operation] == "npu"
    call = getattr(moe_kernels, operation)
    ours, theirs = (outputs_and_gradients(call, case, device) for device in (NPU, torch.device("cpu")))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.is_floating_point() == other.is_floating_point()
        assert not mine.is_floating_point() or mine.dtype == other.dtype
        assert distance(mine, other) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 32), (5, 7, 32), (2, 3, 4, 16)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    same("rms_norm", Case([random(*shape, dtype=dtype), random(shape[-1]), 1e-6]), dtype)


def test_rms_norm_of_a_view_that_is_not_contiguous() -> None:
    same("rms_norm", Case([random(32, 6).t(), random(32), 1e-5]), FP32)


@DTYPES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotate(batch: int, inverse: bool, dtype: torch.dtype) -> None:
    """Cosine and sine come as they are used: without gradients, and one table for each row of the batch."""
    cosine, sine = angles(batch, 5, 8)
    call = lambda x, **more: moe_kernels.rotate(x, cosine.to(x.device), sine.to(x.device), **more)  # noqa: E731
    case = Case([random(batch, 5, 2, 8, dtype=dtype)], {"inverse": inverse})
    ours, theirs = (outputs_and_gradients(call, case, device) for device in (NPU, torch.device("cpu")))
    assert max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True)) <= TOLERANCE[dtype]


@DTYPES
def test_rotate_turns_the_last_channels_and_keeps_the_others(dtype: torch.dtype) -> None:
    cosine, sine = angles(1, 5, 4)
    x = random(2, 5, 3, 10, dtype=dtype)
    ours = moe_kernels.rotate(x.to(NPU), cosine.to(NPU), sine.to(NPU)).cpu()
    assert torch.equal(ours[..., :6], x[..., :6])
    assert distance(ours[..., 6:], moe_kernels.rotate(x[..., 6:], cosine, sine)) <= TOLERANCE[dtype]
    back = moe_kernels.rotate(ours.to(NPU), cosine.to(NPU), sine.to(NPU), inverse=True)
    assert distance(back, x) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("rows", [1, 9])
def test_swiglu(rows: int, limit: float | None, dtype: torch.dtype) -> None:
    same("swiglu", Case([random(rows, 24, dtype=dtype)], {"limit": limit}), dtype)


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(1, 1, 2), (1, 1, 1), (4, 2, 3)])
def test_route(score: str, groups: int, top_groups: int, top_k: int) -> None:
    keywords = {"score": score, "groups": groups, "top_groups": top_groups, "scale": 2.5}
    bias = random(16, seed=2) * 0.1
    call = lambda x, w, **more: moe_kernels.route(x, w, bias.to(x.device), top_k, **more)  # noqa: E731
    case = Case([random(11, 12), random(16, 12)], keywords)
    ours, theirs = (outputs_and_gradients(call, case, device) for device in (NPU, torch.device("cpu")))
    order = [found[0].cpu().argsort(dim=1) for found in (ours, theirs)]
    assert torch.equal(ours[0].cpu().gather(1, order[0]), theirs[0].gather(1, order[1]))
    assert distance(ours[1].cpu().gather(1, order[0]), theirs[1].gather(1, order[1])) <= TOLERANCE[FP32]
    assert max(distance(mine, other) for mine, other in zip(ours[2:], theirs[2:], strict=True)) <= TOLERANCE[FP32]


@DTYPES
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 3), (13, 1), (13, 3)])
def test_permute(tokens: int, top_k: int, dtype: torch.dtype) -> None:
    same("permute", Case([random(tokens, 8, dtype=dtype), chosen_experts(tokens, top_k, used=6), 7]), dtype)


@DTYPES
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 3), (13, 1), (13, 3)])
def test_unpermute(tokens: int, top_k: int, dtype: torch.dtype) -> None:
    places = moe_kernels.permute(random(tokens, 8), chosen_experts(tokens, top_k, used=6), 7)[1].to(torch.int32)
    rows, weights = random(tokens * top_k, 8, dtype=dtype), random(tokens, top_k, dtype=dtype).abs()
    same("unpermute", Case([rows, places, weights]), dtype)


def test_expert_load() -> None:
    indices = chosen_experts(13, 3, used=6)
    ours = moe_kernels.expert_load(indices.to(NPU), 7)
    assert ours.dtype == torch.int64 and ours.tolist() == torch.bincount(indices.flatten(), minlength=7).tolist()


@DTYPES
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [1, 0, 0, 0]], ids=str)
def test_grouped_matmul(counts: list[int], dtype: torch.dtype) -> None:
    x, weight = random(sum(counts), 8, dtype=dtype), random(4, 6, 8, dtype=dtype)
    same("grouped_matmul", Case([x, weight, torch.tensor(counts)]), dtype)


def test_grouped_matmul_of_views_that_are_not_contiguous() -> None:
    same("grouped_matmul", Case([random(8, 9).t(), random(6, 4, 8).transpose(0, 1), torch.tensor([3, 0, 5, 1])]), FP32)


@DTYPES
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 2), (33, 1), (33, 3)])
def test_experts(tokens: int, top_k: int, dtype: torch.dtype) -> None:
    """The last of seven experts gets no token and no gradient."""
    gate_up, down = random(7, 16, 12, dtype=dtype) * 0.3, random(7, 12, 8, dtype=dtype) * 0.3
    indices, weights = chosen_experts(tokens, top_k, used=6), random(tokens, top_k).abs()
    same("experts", Case([random(tokens, 12, dtype=dtype), indices, weights, gate_up, down]), dtype)


def test_experts_of_views_that_are_not_contiguous() -> None:
    gate_up, down = random(16, 7, 12).transpose(0, 1), random(12, 7, 8).transpose(0, 1)
    indices, weights = chosen_experts(9, 2, used=7), random(2, 9).abs().t()
    same("experts", Case([random(12, 9).t(), indices, weights, gate_up, down]), FP32)


def test_experts_under_autocast_compute_in_bfloat16() -> None:
    inputs = [random(9, 12), chosen_experts(9, 2, used=7), random(9, 2).abs(), random(7, 16, 12), random(7, 12, 8)]
    with torch.autocast("npu", dtype=BF16):
        ours = moe_kernels.experts(*(tensor.to(NPU) for tensor in inputs))
    assert ours.dtype == BF16
    assert distance(ours, moe_kernels.experts(*inputs)) <= TOLERANCE[BF16]


@DTYPES
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("documents", [None, [0, 0, 1, 1, 1], [0, 1, 2, 3, 4]], ids=str)
def test_attention(documents: list[int] | None, queries: int, dtype: torch.dtype) -> None:
    """As many queries as keys, and one query at the end of a cache; values narrower than keys."""
    ids = None if documents is None else torch.tensor([documents, sorted(documents, key=lambda d: d > 1)])
    call = lambda q, k, v: moe_kernels.attention(q, k, v, 0.3, None if ids is None else ids.to(q.device))  # noqa: E731
    shapes = [(2, queries, 3, 12), (2, 5, 3, 12), (2, 5, 3, 8)]
    case = Case([random(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes)])
    ours, theirs = (outputs_and_gradients(call, case, device) for device in (NPU, torch.device("cpu")))
    assert ours[0].shape == (2, queries, 3, 8)
    assert max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True)) <= TOLERANCE[dtype]


def test_attention_of_more_documents_than_one_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_kernels.npu import attention

    monkeypatch.setattr(attention, "MOST_DOCUMENTS", 2)
    ids = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]])
    call = lambda q, k, v: moe_kernels.attention(q, k, v, 0.3, ids.to(q.device))  # noqa: E731
    case = Case([random(2, 5, 3, width, seed=n) for n, width in enumerate((12, 12, 8))])
    ours, theirs = (outputs_and_gradients(call, case, device) for device in (NPU, torch.device("cpu")))
    assert max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True)) <= TOLERANCE[FP32]


@pytest.mark.parametrize(
    "operation", ["cached_window_attention", "cross_entropy_with_gradient", "hyper_read", "window_attention"]
)
def test_operations_as_the_passport_compares_them(operation: str) -> None:
    assert moe_kernels.chosen(NPU)[operation] == "npu"
    for dtype in numerics.dtypes(operation):
        assert numerics.compare(operation, dtype, NPU)[0].error <= numerics.tolerance(operation, dtype)


@DTYPES
def test_cross_entropy(dtype: torch.dtype) -> None:
    targets = torch.tensor([3, -100, 0, 15, -100, 7])
    same("cross_entropy", Case([random(6, 16, dtype=dtype), targets]), dtype)


@pytest.mark.parametrize("reference", [False, True])
def test_adamw_step(reference: bool) -> None:
    """Three steps beside torch.optim.AdamW on the CPU."""
    shapes = [(5, 7), (11,), (1,)]
    theirs = [random(*shape).requires_grad_() for shape in shapes]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    ours = [random(*shape).to(NPU) for shape in shapes]
    moments = [[torch.zeros_like(weight) for weight in ours] for _ in range(2)]
    state = moe_kernels.AdamWState(*moments, steps=[torch.zeros((), device=NPU) for _ in ours])
    for step in range(3):
        gradients = [random(*shape, seed=9 + step) for shape in shapes]
        for weight, gradient in zip(theirs, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        moved = [gradient.to(NPU) for gradient in gradients]
        with moe_kernels.reference_only() if reference else nullcontext():
            moe_kernels.adamw_step(ours, moved, state, moe_kernels.AdamW(1e-2, weight_decay=0.1))
    assert max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True)) <= 1e-6
    assert [step.item() for step in state.steps] == [3.0] * 3


def test_a_switch_forces_the_reference_and_ends() -> None:
    with moe_kernels.reference_only():
        assert set(moe_kernels.chosen(NPU).values()) == {"reference"}
        inside = moe_kernels.rms_norm(random(3, 8).to(NPU), random(8).to(NPU), 1e-6)
    assert moe_kernels.chosen(NPU)["rms_norm"] == "npu"
    assert distance(inside, moe_kernels.rms_norm(random(3, 8), random(8), 1e-6)) <= TOLERANCE[FP32]


def test_other_devices_do_without() -> None:
    assert "npu" not in moe_kernels.chosen(torch.device("cpu")).values()
