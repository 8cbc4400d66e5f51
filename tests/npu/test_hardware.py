"""What only a card can show: that its own kernels are right and fast. Emulated runs report these as NOT RUN."""

from __future__ import annotations

import time

import moe_kernels
import pytest
import torch
from cases import NPU, distance, random
from moe_kernels import device

pytestmark = pytest.mark.npu_hardware


@pytest.mark.parametrize("hidden", [1024, 7168])
def test_norm_of_wide_rows_in_bfloat16(hidden: int) -> None:
    x, weight = random(512, hidden, dtype=torch.bfloat16), random(hidden)
    assert distance(moe_kernels.rms_norm(x.to(NPU), weight.to(NPU), 1e-6), moe_kernels.rms_norm(x, weight, 1e-6)) < 1e-2


def test_attention_over_a_long_row() -> None:
    q, k, v = (random(1, 4096, 4, width, dtype=torch.bfloat16, seed=n) for n, width in enumerate((192, 192, 128)))
    ours = moe_kernels.attention(q.to(NPU), k.to(NPU), v.to(NPU), 192**-0.5)
    assert distance(ours, moe_kernels.attention(q, k, v, 192**-0.5)) < 2e-2


def test_weights_of_experts_given_as_transposed_views() -> None:
    """The forward product reads [E, F, D] weights through a transposed view."""
    x, weight, counts = random(512, 256, dtype=torch.bfloat16), random(8, 512, 256, dtype=torch.bfloat16), [64] * 8
    ours = moe_kernels.grouped_matmul(x.to(NPU), weight.to(NPU), torch.tensor(counts).to(NPU))
    assert distance(ours, moe_kernels.grouped_matmul(x, weight, torch.tensor(counts))) < 1e-2


def test_one_grouped_product_is_faster_than_one_product_per_expert() -> None:
    x, weight = (random(*shape, dtype=torch.bfloat16).to(NPU) for shape in ((8192, 1024), (64, 2048, 1024)))
    counts = torch.full((64,), 128, device=NPU)

    def seconds(call) -> float:
        call()
        torch.accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.accelerator.synchronize()
        return time.perf_counter() - start

    def one_by_one() -> None:
        for rows, matrix in zip(x.split(128), weight, strict=True):
            torch.mm(rows, matrix.t())

    assert seconds(lambda: moe_kernels.grouped_matmul(x, weight, counts)) < seconds(one_by_one)


def test_the_best_product_reaches_a_third_of_the_published_peak() -> None:
    peak = device.peak(device.name(torch.device("npu", 0)), "bfloat16")
    assert peak is not None
    assert device.measured_peak_flops(torch.device("npu", 0), torch.bfloat16) > peak.flops / 3
