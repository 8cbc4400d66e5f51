"""A model with its tokenizer, to be used: it writes, answers, scores text, and shows which expert took which token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from moe_kernels import device as devices

from model.generate import generate
from model.score import score
from model.size import count_parameters
from pipelines import models
from pipelines.encode import ASSISTANT, BOS, EOS, load_encoder
from pipelines.finetune import mark_assistant
from pipelines.params import UserError

if TYPE_CHECKING:
    import pandas as pd


class Model:
    """A network with its tokenizer, from a folder that a stage wrote.

    Attributes:
        net: the `MoETransformer`, on this machine's device.
        encoder: tiktoken with the merges that the pipeline learnt.
        folder: where it came from.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        """Raises `UserError` when the folder does not hold a model."""
        self.folder = folder
        self.net = models.load(folder, made_by).to(devices.default()).eval()
        self.encoder = load_encoder(folder)

    def generate(
        self, text: str, max_new_tokens: int = 64, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0
    ) -> str:
        """What the model writes after `text`. temperature 0 is greedy; the same seed writes the same.

        Raises `UserError` for an impossible temperature, top_p, seed or length.
        """
        return self._write([BOS, *self.encoder.encode_ordinary(text)], max_new_tokens, temperature, top_p, seed)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        max_new_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> str:
        """The assistant's answer to a question, or to a dialogue: [{"role": "user", "content": "Hello"}, ...].

        Raises `UserError` for what `generate` does, and for a message that is not like this.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        for turn in turns:
            if not _is_message(turn):
                raise UserError(
                    f"{turn!r} is no message; write {{'role': 'user', 'content': 'Hello'}}, the role user or assistant."
                )
        ids = [*mark_assistant(turns, self.encoder)[0].tolist(), ASSISTANT]
        return self._write(ids, max_new_tokens, temperature, top_p, seed)

    def _write(self, ids: list[int], max_new_tokens: int, temperature: float, top_p: float, seed: int) -> str:
        if not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}; choose one from 0 to 2**63 - 1.")
        start = torch.tensor([ids], device=devices.default())
        try:
            out = generate(self.net, start, max_new_tokens, temperature, top_p, seed, eos_token_id=EOS)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        return self.encoder.decode([token for token in out[0, len(ids) :].tolist() if token != EOS])

    def score(self, texts: str | Sequence[str]) -> pd.DataFrame:
        """How well the model foretells texts: one row a text with bytes, tokens, nats, bits_per_byte, perplexity."""
        import pandas as pd

        rows = [texts] if isinstance(texts, str) else list(texts)
        ids = [np.array([BOS, *self.encoder.encode_ordinary(text)]) for text in rows]
        nats, _ = score(self.net, ids, self.net.config.max_position_embeddings, devices.default())
        table = pd.DataFrame({"text": rows, "bytes": [len(text.encode()) for text in rows]})
        table["tokens"], table["nats"] = [len(row) for row in nats], [float(row.sum()) for row in nats]
        table["bits_per_byte"] = table["nats"] / table["bytes"] / math.log(2)
        table["perplexity"] = np.exp(table["nats"] / table["tokens"])
        return table

    def experts(self, text: str) -> Routing:
        """Which experts took which token, in every layer that has experts."""
        tokens = [BOS, *self.encoder.encode_ordinary(text)]
        chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(layer: int) -> Any:
            return lambda _module, _given, out: chosen.__setitem__(layer, (out[0].cpu(), out[1].detach().float().cpu()))

        routers = {n: block.mlp.gate for n, block in enumerate(self.net.model.layers) if hasattr(block.mlp, "gate")}
        hooks = [gate.register_forward_hook(note(layer)) for layer, gate in routers.items()]
        try:
            with torch.no_grad():
                self.net(torch.tensor([tokens], device=devices.default()), with_logits=False)
        finally:
            for hook in hooks:
                hook.remove()
        return Routing([self.encoder.decode([token]) for token in tokens], chosen)

    def __repr__(self) -> str:
        weights, _ = count_parameters(self.net.config)
        return f"<model {self.folder}: {weights / 1e6:.1f} M weights on {devices.name(devices.default())}>"


def _is_message(turn: object) -> bool:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        return False
    return turn.get("role") in ("user", "assistant")


class Routing:
    """Which experts took which token. tokens: their text; `table`: one row a token, layer and rank."""

    def __init__(self, tokens: list[str], chosen: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.tokens, self._chosen = tokens, dict(chosen)

    @property
    def table(self) -> pd.DataFrame:
        """Columns position, token, layer, expert, weight; K rows a token and layer, the heaviest expert first."""
        import pandas as pd

        rows = []
        for layer, (experts_TK, weights_TK) in self._chosen.items():
            order_TK = weights_TK.argsort(dim=-1, descending=True)
            pairs = zip(experts_TK.gather(1, order_TK).tolist(), weights_TK.gather(1, order_TK).tolist(), strict=True)
            for position, (experts, weights) in enumerate(pairs):
                rows += [
                    {"position": position, "token": self.tokens[position], "layer": layer, "expert": e, "weight": w}
                    for e, w in zip(experts, weights, strict=True)
                ]
        return pd.DataFrame(rows, columns=["position", "token", "layer", "expert", "weight"])

    @property
    def first(self) -> pd.DataFrame:
        """The heaviest expert of each token: one row a token, one column a layer."""
        table = self.table.drop_duplicates(["position", "layer"])
        wide = table.pivot(index="position", columns="layer", values="expert")
        wide.insert(0, "token", self.tokens)
        return wide

    def __repr__(self) -> str:
        return self.first.to_string()

    def _repr_html_(self) -> str:
        """One line a layer; a token's colour is its heaviest expert."""
        import html

        lines = []
        wide = self.first
        for layer in wide.columns[1:]:
            spans = [
                f"<span title='expert {expert}' style='background:hsl({expert * 137 % 360} 60% 82%);color:#111;"
                f"padding:0 2px;border-radius:2px'>{html.escape(token.replace(chr(10), '⏎')) or '&nbsp;'}</span>"
                for token, expert in zip(wide["token"], wide[layer], strict=True)
            ]
            lines.append(f"<div style='margin:2px 0'><b>layer {layer}</b> {''.join(spans)}</div>")
        return f"<div style='font-family:monospace;white-space:pre-wrap'>{''.join(lines)}</div>"
