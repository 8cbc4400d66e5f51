"""Sampling from a model, with a cache of latents: each new token costs one forward pass of one position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.attention import LatentCache

if TYPE_CHECKING:
    from model.transformer import MoETransformer


@torch.no_grad()
def generate(
    net: MoETransformer,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = None,
) -> Tensor:
    """Continue each row: [B, S] int64 -> [B, S + at most max_new_tokens], in evaluation mode.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability (nucleus sampling,
    arXiv 1904.09751). A row that met `eos_token_id` is padded with it. Raises `ValueError` for impossible arguments.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, not {list(input_ids.shape)}")
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise ValueError("temperature must be >= 0, 0 < top_p <= 1 and max_new_tokens >= 0")
    training = net.training
    net.eval()
    generator = torch.Generator().manual_seed(seed)
    caches = [LatentCache() for _ in range(net.config.num_hidden_layers)]
    ids, fed = input_ids, input_ids
    done_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        logits_BV = net(fed, caches=caches, start=ids.shape[1] - fed.shape[1]).logits[:, -1]
        fed = _choose(logits_BV, temperature, top_p, generator)
        if eos_token_id is not None:
            fed = fed.masked_fill(done_B.unsqueeze(1), eos_token_id)
            done_B |= fed.squeeze(1) == eos_token_id
        ids = torch.cat([ids, fed], dim=1)
        if done_B.all():
            break
    net.train(training)
    return ids


def _choose(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row, [B, 1]; the draw happens on the CPU so that a seed means the same on every device."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    p_BV, order_BV = (logits_BV.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    p_BV = p_BV.masked_fill(p_BV.cumsum(dim=-1) - p_BV >= top_p, 0.0)
    return order_BV.gather(1, torch.multinomial(p_BV.cpu(), 1, generator=generator).to(order_BV.device))
