"""Residual paths: the plain one of DeepSeek-V3, and DeepSeek-V4's manifold-constrained hyper-connections (mHC).

Both are used alike: `h, write = residual(x)` reads what the sub-layer sees, `x = write(sub_layer(h))` puts it back.
mHC keeps N streams; it reads a weighted sum of them, mixes them by a doubly stochastic matrix and writes to each.
Coefficients and streams stay fp32 under autocast. arXiv 2512.24880, section 4; DeepSeek-V4, arXiv 2606.19348, 2.2.

Shapes: B rows, S tokens, N streams, D hidden size, P = (2 + N) N coefficients a token: read N | write N | mix N x N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from moe_kernels import hyper_head, hyper_read, hyper_write
from moe_kernels.autocast import full_precision
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import Context

Write = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """x + sub_layer(x), on [B, S, D]."""

    def forward(self, x_BSD: Tensor, context: Context) -> tuple[Tensor, Write]:
        return x_BSD, lambda y_BSD: x_BSD + y_BSD


class HyperConnection(nn.Module):
    """mHC around one sub-layer, on [B, S, N, D]; parameter names are those of transformers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = config.hc_mult
        self.config, self.parts = config, [n, n, n * n]
        self.fn = nn.Parameter(torch.empty(sum(self.parts), n * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(sum(self.parts)))
        self.scale = nn.Parameter(torch.ones(len(self.parts)))

    def forward(self, x_BSND: Tensor, context: Context) -> tuple[Tensor, Write]:
        """(what the sub-layer reads [B, S, D], how its output is written: [B, S, D] -> [B, S, N, D])."""
        c = self.config
        with full_precision(x_BSND.device):
            x_TND = x_BSND.float().flatten(0, 1)
            h_TD, write_TN, mix_TNN = hyper_read(
                x_TND, self.fn, self.base, self.scale, c.rms_norm_eps, c.hc_sinkhorn_iters, c.hc_eps
            )
        if context.cache is None:
            context.note("sinkhorn_error", (mix_TNN.detach().sum(dim=-1) - 1).abs().max())

        def write(y_BSD: Tensor) -> Tensor:
            with full_precision(y_BSD.device):
                return hyper_write(x_TND, y_BSD.float().flatten(0, 1), write_TN, mix_TNN).view(x_BSND.shape)

        return h_TD.view(*x_BSND.shape[:2], -1), write


class HyperHead(nn.Module):
    """The streams to one at the end of the trunk: a weighted sum, [B, S, N, D] -> [B, S, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = config.hc_mult
        self.config = config
        self.hc_fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.hc_base = nn.Parameter(torch.zeros(n))
        self.hc_scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BSND: Tensor) -> Tensor:
        with full_precision(x_BSND.device):
            x_TND = x_BSND.float().flatten(0, 1)
            weights, c = (self.hc_fn, self.hc_base, self.hc_scale), self.config
            return hyper_head(x_TND, *weights, c.rms_norm_eps, c.hc_eps).view(*x_BSND.shape[:2], -1)
