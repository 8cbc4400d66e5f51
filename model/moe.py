"""Feed-forward layers: SwiGLU, the sigmoid router without an auxiliary loss, and the mixture of experts.

Shapes: B batch, S tokens a row, T = B * S tokens, D hidden size, F expert width, E routed experts, K experts per token,
G groups of experts. DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
"""

from __future__ import annotations

import torch
from moe_kernels import experts
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202, equation 6; [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses K experts per token by sigmoid affinity plus a bias that only selects (equations 15 and 16)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 whatever the autocast: (indices [T, K] int64, weights [T, K] fp32)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.float(), self.weight.float()).sigmoid()
        choice_TE = self._within_best_groups(scores_TE.detach() + self.e_score_correction_bias)
        indices_TK = choice_TE.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, indices_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return indices_TK, weights_TK * self.config.routed_scaling_factor

    def _within_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Node-limited routing (end of section 2.1.2): a group scores by its two best experts; the others leave."""
        groups = self.config.n_group
        if groups == 1:
            return choice_TE
        choice_TGe = choice_TE.unflatten(-1, (groups, -1))
        best_Tg = choice_TGe.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        outside_TG = torch.ones_like(choice_TGe[..., 0], dtype=torch.bool).scatter_(1, best_Tg, False)
        return choice_TGe.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(-2)


class Experts(nn.Module):
    """The stacked weights of the routed experts; gate rows come first in `gate_up_proj`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))


class MixtureOfExperts(nn.Module):
    """Shared expert plus routed experts, equation 12. Names follow transformers' DeepseekV3MoE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """([B, S, D], tokens that each expert took [E] int64)."""
        x_TD = x_BSD.flatten(0, 1)
        indices_TK, weights_TK = self.gate(x_TD)
        routed_TD = experts(x_TD, indices_TK, weights_TK, self.experts.gate_up_proj, self.experts.down_proj)
        load_E = torch.bincount(indices_TK.flatten(), minlength=len(self.gate.weight))
        return self.shared_experts(x_BSD) + routed_TD.view_as(x_BSD), load_E
