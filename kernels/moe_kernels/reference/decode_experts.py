"""A whole mixture of experts on a few rows: router, routed experts, shared expert.

Shapes: T rows, D hidden size, E experts, K experts per row, F and S widths of a routed and of the shared expert.
DeepSeek-V3, arXiv 2412.19437, equation 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.reference.experts import experts
from moe_kernels.reference.router import route
from moe_kernels.reference.swiglu import swiglu


def decode_experts(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor | None,
    chosen_TK: Tensor | None,
    routed: Sequence[Tensor],
    shared: Sequence[Tensor],
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
    limit: float | None,
) -> Tensor:
    """[T, D]. chosen: experts of each row that no score has a say in; then there is no bias."""
    how = (score, groups, top_groups, normalise, scale)
    *found, _ = route(x_TD, router_ED, bias_E, chosen_TK, top_k, *how)
    gate_SD, up_SD, down_DS = shared
    both_T2S = torch.cat([F.linear(x_TD, gate_SD), F.linear(x_TD, up_SD)], dim=-1)
    return F.linear(swiglu(both_T2S, limit), down_DS) + experts(x_TD, *found, *routed, limit)
