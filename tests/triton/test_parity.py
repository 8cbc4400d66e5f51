"""Each Triton kernel against the reference in float64: values and the gradient of every input."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from moe_kernels import numerics

CPU = torch.device("cpu")


USES = [(operation, dtype) for operation in numerics.CASES for dtype in numerics.dtypes(operation)]


@pytest.mark.parametrize(("operation", "dtype"), USES, ids=lambda value: str(value).removeprefix("torch."))
def test_operations_as_the_passport_compares_them(operation: str, dtype: torch.dtype) -> None:
    assert moe_kernels.chosen(CPU)[operation] == "triton"
    worst, cases = numerics.compare(operation, dtype, CPU)
    assert cases and worst.error <= numerics.tolerance(operation, dtype), worst
