"""Sampling from a model, with a cache: each new token costs one forward pass of one position.

Greedy decoding of a model with multi-token prediction speculates: the MTP block drafts one token ahead, the next pass
checks the draft along with its own token, and a right one saves a pass (DeepSeek-V3, arXiv 2412.19437, section 5.4.3).

Shapes: B rows, S tokens of the longest prompt, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from model.cache import Cache

if TYPE_CHECKING:
    from model.transformer import MoETransformer

CHUNK = 512  # prompt tokens a pass


@torch.no_grad()
def generate(
    net: MoETransformer,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    speculate: bool = True,
) -> Tensor:
    """Continue each row: [B, S] int64 -> [B, S + at most max_new_tokens], in evaluation mode.

    input_ids may also be a list of prompts of different lengths. A row that met a stop token (`eos_token_id`), and a
    shorter prompt's row, is filled up on the right with the stop token, or with 0 where none is given. temperature 0
    is greedy; top_p keeps the smallest set of tokens with that probability (nucleus sampling, arXiv 1904.09751).
    Raises `ValueError` for impossible arguments.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise ValueError("temperature must be >= 0, 0 < top_p <= 1 and max_new_tokens >= 0")
    prompts = _prompts(input_ids)
    stops = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    training = net.training
    net.eval()
    decoder = _Decoder(net, prompts, temperature, top_p, seed, speculate)
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts))) if max_new_tokens else set()
    while open_rows:
        for row, tokens in enumerate(decoder.step()):
            for token in tokens if row in open_rows else ():
                rows[row].append(token)
                if token in stops or len(rows[row]) == max_new_tokens:
                    open_rows.discard(row)
                    break
    net.train(training)
    device, filler = net.lm_head.weight.device, stops[0] if stops else 0
    whole = [torch.cat([prompt, prompt.new_tensor(row)]) for prompt, row in zip(prompts, rows, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=filler).to(device)


def _prompts(input_ids: Tensor | Sequence[Sequence[int]]) -> list[Tensor]:
    prompts = [torch.as_tensor(row, dtype=torch.int64, device="cpu") for row in input_ids]
    if not prompts or any(prompt.ndim != 1 or not len(prompt) for prompt in prompts):
        raise ValueError("input_ids must be [batch, tokens], or a list of prompts, each with at least one token")
    return prompts


class _Decoder:
    """The state of a batch: what the trunk has seen (`cache`), the token chosen after it, and the MTP block's part."""

    def __init__(
        self, net: MoETransformer, prompts: list[Tensor], temperature: float, top_p: float, seed: int, speculate: bool
    ) -> None:
        self.net, self.temperature, self.top_p = net, temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)
        self.device = net.lm_head.weight.device
        self.speculates = speculate and temperature == 0 and net.config.num_nextn_predict_layers > 0
        self.cache, self.ahead = Cache(len(prompts), self.device), Cache(len(prompts), self.device)
        self.first = True
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        ids_BS = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(self.device)
        self._read(ids_BS, lengths_B)

    def step(self) -> list[list[int]]:
        """The next tokens of each row: one, or two where a draft was right. The first call gives the first token."""
        if self.first:
            self.first = False
            return self.token_B1.tolist()
        if not self.speculates:
            out = self.net(self.token_B1, cache=self.cache, with_logits=True)
            self.cache.settle(self.cache.lengths_B + 1)
            self.token_B1 = self._choose(out.logits[:, -1])
            return self.token_B1.tolist()
        return self._speculate()

    def _read(self, ids_BS: Tensor, lengths_B: Tensor) -> None:
        """The prompts, chunk by chunk; leaves the first chosen token, and for the MTP block the last state."""
        length, rows = ids_BS.shape[1], torch.arange(len(ids_BS), device=self.device)
        hidden_BD, state_B = None, None
        for start in range(0, length, CHUNK):
            part_BC = ids_BS[:, start : start + CHUNK]
            counts_B = (lengths_B - start).clamp(0, part_BC.shape[1])
            out = self.net(part_BC, cache=self.cache, counts_B=counts_B, with_logits=False)
            last_B, ends_B = (counts_B - 1).clamp(min=0), (lengths_B > start) & (lengths_B <= start + CHUNK)
            hidden_BD = _where(ends_B, out.hidden[rows, last_B], hidden_BD)
            state_B = _where(ends_B, out.state[rows, last_B], state_B)
            self.cache.settle(torch.minimum(lengths_B, torch.full_like(lengths_B, start + CHUNK)))
            if self.speculates:
                next_BC = F.pad(ids_BS, (0, 1))[:, start + 1 : start + 1 + part_BC.shape[1]]
                known_B = (lengths_B - 1 - start).clamp(0, part_BC.shape[1])
                self.net.foretell(out.state, next_BC, self.ahead, known_B)
                self.ahead.settle(self.ahead.lengths_B + known_B)
        self.token_B1 = self._choose(self._logits(hidden_BD))
        self.next_B2, self.state_B2, self.new_B = self.token_B1, state_B.unsqueeze(1), torch.ones_like(lengths_B)

    def _speculate(self) -> list[list[int]]:
        """Draft, check, and keep what is right. next_B2, state_B2, new_B: what the MTP block has not seen."""
        rows = torch.arange(len(self.new_B), device=self.device)
        foretold = self.net.foretell(self.state_B2, self.next_B2, self.ahead, self.new_B)
        self.ahead.settle(self.ahead.lengths_B + self.new_B)
        draft_B1 = self._logits(foretold[rows, self.new_B - 1]).argmax(dim=-1, keepdim=True)
        out = self.net(torch.cat([self.token_B1, draft_B1], dim=1), cache=self.cache, with_logits=True)
        self.next_B2 = out.logits.argmax(dim=-1)
        right_B = self.next_B2[:, 0] == draft_B1[:, 0]
        self.state_B2, self.new_B = out.state, 1 + right_B.long()
        self.cache.settle(self.cache.lengths_B + self.new_B)
        self.token_B1 = self.next_B2[rows, self.new_B - 1].unsqueeze(1)
        return [tokens[:count] for tokens, count in zip(self.next_B2.tolist(), self.new_B.tolist(), strict=True)]

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        return F.linear(hidden_BD, self.net.lm_head.weight).float()

    def _choose(self, logits_BV: Tensor) -> Tensor:
        """One token a row, [B, 1]; the draw happens on the CPU so that a seed means the same on every device."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1, keepdim=True)
        p_BV, order_BV = (logits_BV / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        p_BV = p_BV.masked_fill(p_BV.cumsum(dim=-1) - p_BV >= self.top_p, 0.0)
        drawn_B1 = torch.multinomial(p_BV.cpu(), 1, generator=self.generator)
        return order_BV.gather(1, drawn_B1.to(order_BV.device))


def _where(ends_B: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """Rows whose prompt ends here take the new value."""
    return new if old is None else torch.where(ends_B.view(-1, *[1] * (new.ndim - 1)), new, old)
