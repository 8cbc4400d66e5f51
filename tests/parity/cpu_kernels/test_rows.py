"""What is computed row by row: SwiGLU, RMSNorm, rotary embedding, cross entropy."""

from __future__ import annotations

from functools import partial

import moe_kernels
import pytest
import torch
from kernel_cases import (
    DTYPES,
    FP32,
    FP64,
    angles,
    assert_in_use,
    assert_near,
    assert_same,
    outputs_and_gradients,
    random,
)
from moe_kernels.reference import swiglu
from torch import Tensor
from torch.nn import functional as F


@DTYPES
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("shape", [(1, 24), (9, 2, 38), (0, 6), (300, 512)], ids=str)
def test_swiglu(shape: tuple[int, ...], limit: float | None, dtype: torch.dtype) -> None:
    assert_same("swiglu", swiglu.swiglu, [random(*shape, dtype=dtype), limit])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 32), (5, 7, 33), (0, 8), (700, 64), (3, 5)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    exact = lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps)  # noqa: E731
    assert_same("rms_norm", exact, [random(*shape, dtype=dtype), random(shape[-1]), 1e-6])
    assert_same("rms_norm", exact, [random(*shape, dtype=dtype), None, 1e-6])


def test_rms_norm_of_a_view_that_is_not_contiguous() -> None:
    exact = lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps)  # noqa: E731
    assert_same("rms_norm", exact, [random(33, 6).t(), random(33), 1e-5])


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
        assert_in_use("rotate")
        assert_near(ours, theirs, dtype)


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
    assert_near([losses], [theirs], FP32)
    assert_near([gradient], [exact.grad], dtype)
    logits.requires_grad_()
    alone = moe_kernels.cross_entropy(logits, targets)
    (alone.sum() * scale).backward()
    assert_in_use("cross_entropy")
    assert torch.equal(alone, losses)
    assert_near([logits.grad], [exact.grad], dtype)
    for call in (moe_kernels.cross_entropy, partial(moe_kernels.cross_entropy_with_gradient, scale=scale)):
        with pytest.raises(RuntimeError, match="there is no word 99999"):
            call(random(1, words), torch.tensor([99999]))
