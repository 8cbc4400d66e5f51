"""Feed-forward layers: SwiGLU, the routers of DeepSeek-V3 and V4, and the mixture of experts.

Shapes: B rows, S tokens a row, T = B * S tokens, D hidden size, F expert width, E routed experts, K experts per token,
G groups of experts. DeepSeek-V3, arXiv 2412.19437, section 2.1.2; V4, arXiv 2606.19348, section 2.1.
"""

from __future__ import annotations

from typing import Any

import torch
from moe_kernels import balance, decode_experts, experts, route, swiglu
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import Context
from model.linear import Linear
from model.precision import rounded


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202, equation 6; [..., D] -> [..., D].

    limit: V4 cuts the gate above it and `up` on both sides.
    """

    def __init__(self, hidden_size: int, width: int, limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = rounded(x)
        both = [context.linear(x, projection.weight) for projection in (self.gate_proj, self.up_proj)]
        return context.linear(swiglu(torch.cat(both, dim=-1), self.limit), self.down_proj.weight)


class Router(nn.Module):
    """Chooses K experts per token by affinity plus a bias that only selects, and weighs them by affinity.

    V3: sigmoid affinity, groups of experts (equations 15 and 16). V4: sqrt(softplus), no groups.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self._add_table()

    def _add_table(self) -> None:
        self.register_buffer("e_score_correction_bias", torch.zeros(self.config.n_routed_experts))

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(indices [T, K], weights [T, K], affinities [T, E]), see `moe_kernels.route`."""
        bias_E, chosen_TK = self.choice(ids_T)
        return route(x_TD, self.weight, bias_E, chosen_TK=chosen_TK, **self.rule())

    def choice(self, ids_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What chooses: (a bias, no experts) or (no bias, the experts of each token)."""
        return self.e_score_correction_bias, None

    def rule(self) -> dict[str, Any]:
        """How, in the words of the operation."""
        c = self.config
        return {
            "top_k": c.num_experts_per_tok,
            "score": "sqrt_softplus" if c.is_v4 else "sigmoid",
            "groups": 1 if c.is_v4 else c.n_group,
            "top_groups": 1 if c.is_v4 else c.topk_group,
            "normalise": c.norm_topk_prob,
            "scale": c.routed_scaling_factor,
        }


class HashRouter(Router):
    """The first layers of V4: a fixed table names the experts of each token id; affinities only weigh them.

    The table gives every token K different experts and every expert the same number of tokens (Hash Layers,
    arXiv 2106.04426, section 3.1, balanced); it is made from a fixed seed and saved with the weights.
    """

    def _add_table(self) -> None:
        self.register_buffer("tid2eid", balanced_table(self.config))

    def choice(self, ids_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None, self.tid2eid[ids_T]


def balanced_table(config: ModelConfig) -> Tensor:
    """[V, K] int64. E neighbouring ids at a time take a random order of the experts at K different shifts: each expert
    is taken K times, and no token takes one twice. A BPE's ids go from frequent to rare, so load is balanced too."""
    vocabulary, chosen, number = config.vocab_size, config.num_experts_per_tok, config.n_routed_experts
    generator = torch.Generator("cpu").manual_seed(0)
    rounds = -(-vocabulary // number)
    order_RE, shift_RE = (torch.rand(rounds, number, generator=generator, device="cpu").argsort() for _ in range(2))
    place_RX = (torch.arange(number, device="cpu")[:, None] + shift_RE[:, None, :chosen]).flatten(1) % number
    return order_RE.gather(1, place_RX).view(-1, chosen)[:vocabulary].to(torch.get_default_device())


class Experts(nn.Module):
    """The stacked weights of the routed experts; gate rows come first in `gate_up_proj`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))


class MixtureOfExperts(nn.Module):
    """Shared expert plus routed experts, equation 12. Names follow transformers' DeepseekV3MoE and V4's."""

    def __init__(self, config: ModelConfig, kind: str = "moe") -> None:
        super().__init__()
        self.limit = config.swiglu_limit if config.is_v4 else None
        self.gate = HashRouter(config) if kind == "hash_moe" else Router(config)
        self.experts = Experts(config)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = SwiGLU(config.hidden_size, width, self.limit)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        """[B, S, D] -> [B, S, D]; but while decoding, notes the load of each expert, and what balances it."""
        x_TD = x_BSD.flatten(0, 1)
        if context.decoding:
            return self._decode(x_TD, context.input_ids.flatten()).view_as(x_BSD)
        indices_TK, weights_TK, scores_TE = self.gate(x_TD, context.input_ids.flatten())
        if context.cache is None:
            self._note(indices_TK, scores_TE, context)
        x_TD = rounded(x_TD)
        routed_TD = experts(x_TD, indices_TK, weights_TK, self.experts.gate_up_proj, self.experts.down_proj, self.limit)
        return (self.shared_experts(x_TD, context) + routed_TD).view_as(x_BSD)

    def _decode(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        gate, shared = self.gate, self.shared_experts
        routed = [self.experts.gate_up_proj, self.experts.down_proj]
        all_take = [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight]
        return decode_experts(x_TD, gate.weight, *gate.choice(ids_T), routed, all_take, **gate.rule(), limit=self.limit)

    def _note(self, indices_TK: Tensor, scores_TE: Tensor, context: Context) -> None:
        load_E, entropy, loss = balance(indices_TK, scores_TE, context.first_BS, context.real_BS)
        context.note("expert_load", load_E)
        context.note("router_entropy", entropy)
        if self.training and not isinstance(self.gate, HashRouter):
            context.note("balance_loss", loss)
