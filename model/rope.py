"""Rotary position embedding, interleaved pairs, with YaRN for contexts beyond the trained length.

Shapes: B batch, S tokens, H heads, D channels of a head, R rotary channels, the last of the D.
RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071, section 3.2; DeepSeek-V3, arXiv 2412.19437, section 4.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def frequencies(channels: int, rope: dict[str, Any]) -> Tensor:
    """Angle per position of each channel pair, fp32 [R / 2]; slow pairs are interpolated when rope_type is yarn."""
    theta = rope["rope_theta"]
    plain = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    if rope["rope_type"] == "default":
        return plain.float()
    length = rope["original_max_position_embeddings"]

    def pair_with_turns(turns: float) -> float:
        return channels * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_with_turns(rope.get("beta_slow", 1))), channels - 1)
    pairs = torch.arange(channels // 2, dtype=torch.float64)
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return (plain * (1 - ramp) + plain / rope["factor"] * ramp).float()


def yarn_mscale(rope: dict[str, Any], key: str) -> float:
    """Temperature of the longer context, YaRN equation 22: 0.1 * mscale * ln(factor) + 1; 1 without YaRN."""
    if rope["rope_type"] == "default" or rope["factor"] <= 1:
        return 1.0
    return 0.1 * rope.get(key, 0) * math.log(rope["factor"]) + 1.0


def rotation(positions_BS: Tensor, frequencies_R: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cosine, sine) of the angles times `factor`, fp32 [B, S, 1, R / 2]."""
    angles = positions_BS[..., None, None].float() * frequencies_R.to(positions_BS.device)
    return angles.cos() * factor, angles.sin() * factor


def rotation_scale(rope: dict[str, Any]) -> float:
    """What YaRN multiplies cosine and sine by: the quotient of both temperatures when both are given."""
    if rope["rope_type"] == "default":
        return 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_mscale(rope, "mscale") / yarn_mscale(rope, "mscale_all_dim")
    return 0.1 * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0


def rotate_last(x_BSHD: Tensor, rotation: tuple[Tensor, Tensor], inverse: bool = False) -> Tensor:
    """Rotate the last R channels forth, or back; the ones before have no position."""
    cos_BS1R, sin_BS1R = rotation
    plain_BSHN, x_BSHR = x_BSHD.split([x_BSHD.shape[-1] - 2 * cos_BS1R.shape[-1], 2 * cos_BS1R.shape[-1]], dim=-1)
    return torch.cat([plain_BSHN, rotate(x_BSHR, cos_BS1R, -sin_BS1R if inverse else sin_BS1R)], dim=-1)


def rotate(x_BSHR: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor) -> Tensor:
    """Rotate each adjacent pair (2i, 2i + 1) of the last axis in fp32; the dtype of `x_BSHR` is kept."""
    even, odd = x_BSHR.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos_BS1R - odd * sin_BS1R, odd * cos_BS1R + even * sin_BS1R], dim=-1)
    return pairs.flatten(-2).to(x_BSHR.dtype)
