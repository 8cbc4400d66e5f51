"""Multi-token prediction: one more block that reads a token's last state and the next token, and predicts the one
after (DeepSeek-V3, arXiv 2412.19437, section 2.2; V4, arXiv 2606.19348, section 2.1). It shares embedding and head.

Shapes: B rows, S tokens, D hidden size, N residual streams (V4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.block import Block
from model.config import ModelConfig
from model.context import Context
from model.hyper_connections import HyperHead
from model.linear import Linear
from model.norm import RMSNorm


class MultiTokenPrediction(Block):
    """A block of the trunk's kind (V4: with the window alone) behind a projection of state and embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, None)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.is_v4 = config.is_v4
        self.enorm, self.hnorm, self.norm = RMSNorm(d, eps), RMSNorm(d, eps), RMSNorm(d, eps)
        if config.is_v4:
            self.e_proj, self.h_proj = Linear(d, d), Linear(d, d)
            self.hc_head = HyperHead(config)
        else:
            self.eh_proj = Linear(2 * d, d)

    def predict(self, state: Tensor, next_BSD: Tensor, context: Context) -> Tensor:
        """State for the head [B, S, D]. state: the trunk's last, [B, S, D] or [B, S, N, D]; next: next embeddings."""
        next_BSD = self.enorm(next_BSD)
        if not self.is_v4:
            x_BSD = context.linear(torch.cat([next_BSD, self.hnorm(state)], dim=-1), self.eh_proj.weight)
            return self.norm(self(x_BSD, context, "mtp"))
        next_BSD = context.linear(next_BSD, self.e_proj.weight)
        x_BSND = next_BSD.unsqueeze(2).float() + context.linear(self.hnorm(state), self.h_proj.weight)
        return self.norm(self.hc_head(self(x_BSND, context, "mtp")))
