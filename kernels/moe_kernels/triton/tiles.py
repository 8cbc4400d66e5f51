"""What the kernels of this folder share: how many programs run, where a tile lies, and products.

A kernel is launched with a few programs for each core of the device, and each takes tasks in turn: an NPU has some
twenty cores and starts programs slowly, and sums over rows come to one part a program without atomics. The offset of a
tile is one int64 number, offsets inside of it are int32. All arithmetic is fp32, products take what they are given.

The text keeps to what triton-ascend documents and CUDA compiles as well;
tests/triton_kernels/test_common_subset.py holds that.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import device

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # element types that the kernels know
ELEMENTS = 4096  # of a tile that is no operand of a product: 16 KB in fp32, of the 96 KB that a core of an NPU has
PROGRAMS = {"npu": 1}  # for each core; elsewhere several wait for memory in turn
ELSEWHERE = 8


def grid(tasks: int, like: Tensor) -> tuple[int]:
    """As many programs as there are tasks, or as the device of `like` runs at once; at least one."""
    each = PROGRAMS.get(like.device.type, ELSEWHERE)
    return (max(1, min(tasks, each * device.cores(like.device))),)


def side(size: int, most: int) -> int:
    """Side of a tile that is an operand of a product: a power of two from 16 to `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


def tile(width: int, rows: int = ELEMENTS) -> tuple[int, int]:
    """(rows, columns) of a tile for memory-bound kernels on rows of `width`."""
    columns = min(1024, triton.next_power_of_2(width))
    return max(1, min(ELEMENTS // columns, triton.next_power_of_2(rows))), columns


def fit(*tensors: Tensor) -> bool:
    """Whether all are plain strided tensors of one of the element types."""
    return all(tensor.dtype in FLOATS and tensor.layout is torch.strided for tensor in tensors)


@triton.jit
def spot(task, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """(first row of a tile as int64, its rows, its columns, which of them exist); tiles side by side come in turn."""
    across = tl.cdiv(WIDTH, COLUMNS)
    below = task // across
    row = tl.arange(0, ROWS)[:, None]
    column = (task % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.cast(below, tl.int64) * ROWS, row, column, (row < rows - below * ROWS) & (column < WIDTH)


@triton.jit
def multiply(a, b) -> tl.tensor:
    """a @ b in fp32; NumPy, which the interpreter computes with, has no bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
