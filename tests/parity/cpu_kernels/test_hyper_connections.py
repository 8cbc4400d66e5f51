"""Hyper-connections: residual streams are read, written and joined."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from kernel_cases import FP64, assert_same, head_inputs, read_inputs, write_inputs
from moe_kernels.reference import hyper_connection
from torch import Tensor

STREAMS = [(1, 4, 256), (33, 4, 40), (100, 1, 7), (5, 8, 33), (70, 3, 17), (300, 2, 64), (0, 4, 8), (17, 5, 1)]


@pytest.mark.parametrize("shape", STREAMS, ids=str)
def test_hyper_read(shape: tuple[int, int, int]) -> None:
    assert_same("hyper_read", hyper_connection.hyper_read, read_inputs(*shape))


@pytest.mark.parametrize("shape", STREAMS, ids=str)
def test_hyper_write(shape: tuple[int, int, int]) -> None:
    assert_same("hyper_write", hyper_connection.hyper_write, write_inputs(*shape))


@pytest.mark.parametrize("shape", STREAMS, ids=str)
def test_hyper_head(shape: tuple[int, int, int]) -> None:
    assert_same("hyper_head", hyper_connection.hyper_head, head_inputs(*shape))


def test_hyper_connections_of_views_of_many_streams_and_of_float64() -> None:
    x, *others = read_inputs(9, 4, 16)
    assert_same("hyper_read", hyper_connection.hyper_read, [x.transpose(0, 1).contiguous().transpose(0, 1), *others])
    wide = read_inputs(2, 9, 4)
    assert torch.equal(moe_kernels.hyper_read(*wide)[0], hyper_connection.hyper_read(*wide)[0])
    exact = [value.double() if isinstance(value, Tensor) else value for value in read_inputs(2, 4, 4)]
    assert moe_kernels.hyper_read(*exact)[0].dtype == FP64
