"""The angles of rotary position embedding, with YaRN for contexts beyond the trained length.

Shapes: B batch, S tokens, R rotary channels.
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
