"""Newton-Schulz iterations in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import moe_kernels
import pytest
import torch
from kernel_cases import BF16, FP32, assert_in_use, distance, random
from moe_kernels.reference import newton_schulz

MATRICES = [(3, 128, 256), (2, 256, 128), (1, 7, 5), (2, 70, 33), (1, 300, 300), (4, 1, 9), (0, 4, 4)]


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_newton_schulz_in_bfloat16(shape: tuple[int, int, int]) -> None:
    x = random(*shape)
    for steps in (newton_schulz.COEFFICIENTS, newton_schulz.COEFFICIENTS[-3:]):
        exact = newton_schulz.newton_schulz(x.double(), steps)
        ours = moe_kernels.newton_schulz(x, steps, BF16)
        assert_in_use("newton_schulz")
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
