"""Block-scaled number formats in which DeepSeek publishes weights, read as fp32.

Shapes: O rows (outputs), I columns (inputs). FP8: e4m3 values, one scale for 128 x 128 (arXiv 2412.19437, section 3.3).
MXFP4: e2m1 values, two a byte with the first in the low bits, one scale for 32 of a row (OCP Microscaling Formats
specification, version 1.0). Scales are fp32, or powers of two in e8m0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))  # the fourth bit is the sign
PAIRS = torch.stack((E2M1.repeat(16), E2M1.repeat_interleave(16)), dim=1)  # [256, 2]: the two values of every byte


@dataclass(frozen=True)
class BlockFormat:
    """Values that share a scale with the others of their block (rows, columns)."""

    block: tuple[int, int]
    values_per_byte: int

    def stored_shapes(self, shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """Shapes on disk of values and scales of a matrix [O, I]; blocks at the end may be incomplete."""
        (rows, columns), (height, width) = shape, self.block
        return [rows, columns // self.values_per_byte], [-(-rows // height), -(-columns // width)]

    def dequantise(self, values: Tensor, scales: Tensor) -> Tensor:
        """fp32 [O, I] from values and scales of `stored_shapes`."""
        weight_OI = values.float() if self.values_per_byte == 1 else _unpack(values)
        (rows, columns), (height, width) = weight_OI.shape, self.block
        scales_OI = scales.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        return weight_OI.mul_(scales_OI)


FP8 = BlockFormat(block=(128, 128), values_per_byte=1)
MXFP4 = BlockFormat(block=(1, 32), values_per_byte=2)
FORMATS = {"F8_E4M3": FP8, "I8": MXFP4, "U8": MXFP4}  # by the type in a safetensors header
SCALE_TYPES = ("F32", "F8_E8M0")
SCALE_ENDINGS = ("scale", "weight_scale_inv")  # instead of "weight": of V4, of V3


def _unpack(packed: Tensor) -> Tensor:
    """fp32 [O, I] from int8 [O, I / 2]."""
    return F.embedding(packed.view(torch.uint8).int(), PAIRS).flatten(-2)
