"""Each Triton kernel against the reference in float64: values and the gradient of every input."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from moe_kernels import numerics

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("operation", numerics.CASES)
def test_operations_as_the_passport_compares_them(operation: str, dtype: torch.dtype) -> None:
    if dtype not in numerics.dtypes(operation):
        pytest.skip("fp32 whatever the autocast")
    assert moe_kernels.chosen(CPU)[operation] == "triton"
    worst, cases = numerics.compare(operation, dtype, CPU)
    assert cases and worst.error <= numerics.tolerance(operation, dtype), worst
