"""Feed-forward layers: SwiGLU, the routers of DeepSeek-V3 and V4, and the mixture of experts.

Shapes: B rows, S tokens a row, T = B * S tokens, D hidden size, F expert width, E routed experts, K experts per token,
G groups of experts. DeepSeek-V3, arXiv 2412.19437, section 2.1.2; V4, arXiv 2606.19348, section 2.1.
"""

from __future__ import annotations

import torch
from moe_kernels import decode_experts, experts, linear, swiglu
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.context import Context
from model.linear import Linear
from model.precision import full_precision, rounded


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
        """fp32 whatever the autocast: (indices [T, K] int64, weights [T, K], affinities [T, E])."""
        with full_precision(x_TD.device):
            logits_TE = linear(x_TD.float(), self.weight.float())
        scores_TE = F.softplus(logits_TE).sqrt() if self.config.is_v4 else logits_TE.sigmoid()
        indices_TK = self.choose(scores_TE.detach(), ids_T)
        weights_TK = scores_TE.gather(1, indices_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return indices_TK, weights_TK * self.config.routed_scaling_factor, scores_TE

    def choose(self, scores_TE: Tensor, ids_T: Tensor) -> Tensor:
        """Experts of each token, [T, K]."""
        choice_TE = self._within_best_groups(scores_TE + self.e_score_correction_bias)
        return choice_TE.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices

    def _within_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Node-limited routing (end of section 2.1.2): a group scores by its two best experts; the others leave."""
        groups = 1 if self.config.is_v4 else self.config.n_group
        if groups == 1:
            return choice_TE
        choice_TGe = choice_TE.unflatten(-1, (groups, -1))
        best_Tg = choice_TGe.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        outside_TG = torch.ones_like(choice_TGe[..., 0], dtype=torch.bool).scatter_(1, best_Tg, False)
        return choice_TGe.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(-2)


class HashRouter(Router):
    """The first layers of V4: a fixed table names the experts of each token id; affinities only weigh them.

    The table gives every token K different experts and every expert the same number of tokens (Hash Layers,
    arXiv 2106.04426, section 3.1, balanced); it is made from a fixed seed and saved with the weights.
    """

    def _add_table(self) -> None:
        self.register_buffer("tid2eid", balanced_table(self.config))

    def choose(self, scores_TE: Tensor, ids_T: Tensor) -> Tensor:
        return self.tid2eid[ids_T]


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
        c, gate, shared = self.gate.config, self.gate, self.shared_experts
        hashed = isinstance(gate, HashRouter)
        return decode_experts(
            x_TD,
            gate.weight,
            None if hashed else gate.e_score_correction_bias,
            gate.tid2eid[ids_T] if hashed else None,
            [self.experts.gate_up_proj, self.experts.down_proj],
            [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight],
            c.num_experts_per_tok,
            score="sqrt_softplus" if c.is_v4 else "sigmoid",
            groups=1 if c.is_v4 else c.n_group,
            top_groups=1 if c.is_v4 else c.topk_group,
            normalise=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
            limit=self.limit,
        )

    def _note(self, indices_TK: Tensor, scores_TE: Tensor, context: Context) -> None:
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, indices_TK, 1.0)
        share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        if context.real_BS is not None:
            chosen_TE, share_TE = (x * context.real_BS.reshape(-1, 1) for x in (chosen_TE, share_TE))
        context.note("expert_load", chosen_TE.sum(dim=0).to(torch.int64))
        entropy_T = -torch.xlogy(share_TE.detach(), share_TE.detach()).sum(dim=-1)
        context.note("router_entropy", entropy_T.sum() / _tokens(context))
        if self.training and not isinstance(self.gate, HashRouter):
            context.note("balance_loss", balance_loss(chosen_TE, share_TE, context))


def balance_loss(chosen_TE: Tensor, share_TE: Tensor, context: Context) -> Tensor:
    """Sequence-wise balance (V3, equations 17 to 20): sum over experts of f_e P_e, of each document; mean over tokens.

    f_e = E / (K n) times the tokens of the document that chose e, P_e = mean share of e's affinity among all; 1 when
    every expert is taken alike. Rows of tokens that do not count are zero. Sums inside documents are differences of
    running sums, so that shapes depend on no data.
    """
    rows, length = context.positions_BS.shape
    real_TX = share_TE.new_ones(rows * length, 1) if context.real_BS is None else context.real_BS.reshape(-1, 1)
    sums = [F.pad(x.view(rows, length, -1).cumsum(dim=1), (0, 0, 1, 0)) for x in (chosen_TE, share_TE, real_TX)]
    start_BS1 = context.first_BS.unsqueeze(-1)
    chosen_BSE, share_BSE, n_BS1 = (s[:, 1:] - s.gather(1, start_BS1.expand(-1, -1, s.shape[-1])) for s in sums)
    last_BS = F.pad(context.first_BS[:, 1:] != context.first_BS[:, :-1], (0, 1), value=True)
    loss_BS = (chosen_BSE * share_BSE).sum(dim=-1) / n_BS1.squeeze(-1).clamp(min=1)  # n f P, but for E / K
    return chosen_TE.shape[-1] / context.config.num_experts_per_tok * (loss_BS * last_BS).sum() / _tokens(context)


def _tokens(context: Context) -> Tensor | int:
    """How many tokens count."""
    return context.positions_BS.numel() if context.real_BS is None else context.real_BS.sum().clamp(min=1)
