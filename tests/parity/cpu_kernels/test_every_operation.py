"""What holds for all of them: the same bits, what torch.library expects, compiled graphs, NaN."""

from __future__ import annotations

from collections.abc import Callable

import moe_kernels
import pytest
import torch
from kernel_cases import (
    DTYPES,
    FP32,
    angles,
    attention_inputs,
    balance_inputs,
    causal_inputs,
    expert_inputs,
    head_inputs,
    index_inputs,
    outputs_and_gradients,
    random,
    read_inputs,
    write_inputs,
)
from torch import Tensor

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
    "rotate": [random(2, 90, 3, 24), *angles(2, 90, 8), True],
    "route": [random(900, 24), random(16, 24), random(16), 3],
    "swiglu": [random(900, 48), 0.5],
    "window_attention": attention_inputs(2, 600, 2, 16, 40, 32),
}
FIXED = {"rotate": (1, 2), "cross_entropy_with_gradient": (0, 2), "route": (1,)}  # inputs that have no gradient
OPERANDS = CASES | {"route": [random(90, 16), random(16), None, 3, False, 4, 2, True, 2.5]}  # of the operators


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
