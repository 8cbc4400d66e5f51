"""Each Triton kernel against the reference in float64: values and the gradient of every input."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from kernels_of import LEFT_OUT
from moe_kernels import numerics
from moe_kernels.reference import rms_norm as reference
from torch.nn import functional as F

CPU = torch.device("cpu")


TAKEN = [operation for operation in numerics.CASES if operation not in LEFT_OUT]
USES = [(operation, dtype) for operation in TAKEN for dtype in numerics.dtypes(operation)]


@pytest.mark.parametrize(("operation", "dtype"), USES, ids=lambda value: str(value).removeprefix("torch."))
def test_operations_as_the_passport_compares_them(operation: str, dtype: torch.dtype) -> None:
    assert moe_kernels.chosen(CPU)[operation] == "triton"
    worst, cases = numerics.compare(operation, dtype, CPU)
    assert cases and worst.error <= numerics.tolerance(operation, dtype), worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "words"), [(1, 1), (7, 33), (3, 5000), (0, 8)])
def test_cross_entropy_of_any_vocabulary(tokens: int, words: int, dtype: torch.dtype) -> None:
    logits = (numerics.random(tokens, words) * 4).to(dtype)
    targets = torch.arange(tokens) % words
    targets[1::3] = -100
    exact = logits.double().requires_grad_()
    theirs = F.cross_entropy(exact, targets, reduction="none")
    (theirs.sum() * 0.3).backward()
    losses, gradient = moe_kernels.cross_entropy_with_gradient(logits, targets, torch.tensor(0.3))
    assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
    for ours, other in ((losses, theirs), (gradient, exact.grad)):
        assert numerics.worst("", "", ours, other).error <= numerics.USUAL[ours.dtype]


def test_a_word_that_does_not_exist_has_no_number_for_a_loss() -> None:
    losses = moe_kernels.cross_entropy(numerics.random(2, 5), torch.tensor([99999, 1]))
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("counts", [[0, 0, 0], [70, 0, 1], [1, 130, 64]], ids=str)
def test_experts_of_no_row_and_of_several_tiles(counts: list[int]) -> None:
    x, weight = numerics.random(sum(counts), 9).requires_grad_(), numerics.random(3, 70, 9).requires_grad_()
    call = lambda x, weight: moe_kernels.grouped_matmul(x, weight, torch.tensor(counts))  # noqa: E731
    ours = numerics.results(call, [x, weight])
    with moe_kernels.reference_only():
        theirs = numerics.results(call, [x.double(), weight.double()])
    for name, other in theirs.items():
        assert numerics.worst("", name, ours[name], other).error <= 2e-5


def test_element_types_that_the_kernels_do_not_know_go_to_the_reference() -> None:
    x = numerics.random(3, 8).double()
    assert torch.equal(moe_kernels.rms_norm(x, None, 1e-6), reference.rms_norm(x, None, 1e-6))
