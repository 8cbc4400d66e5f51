"""How many nats a model needs for each token of a document, shown all that is before it or at least half a window.

Shapes: n tokens of a document, S tokens a window, M layers with experts, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.losses import IGNORED, token_losses
from model.transformer import MoETransformer

TOKENS = 8192  # that go through the model at a time
MEANS = ("router_entropy", "indexer_recall")


@torch.no_grad()
def score(
    net: MoETransformer,
    documents: Sequence[np.ndarray],
    sequence_length: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[np.ndarray], Tensor]:
    """(nats of tokens 1 to n - 1 of each document [n - 1], tokens that each expert took [M, E]).

    documents: token ids, the first of which is given and not scored. A document longer than the window is read in
    windows that overlap by half; a token counts in the first window that holds it. advance(tokens) reports progress.
    """
    net.to(device).eval()
    windows = [(d, start) for d, ids in enumerate(documents) for start in _starts(len(ids), sequence_length)]
    by_length: dict[int, list[tuple[int, int]]] = {}
    for d, start in windows:
        by_length.setdefault(min(len(documents[d]) - start, sequence_length), []).append((d, start))
    nats = [np.zeros(max(len(ids) - 1, 0)) for ids in documents]
    load_ME = torch.zeros(0, dtype=torch.int64)
    for length, group in sorted(by_length.items()):
        rows = max(1, TOKENS // length)
        for part in (group[at : at + rows] for at in range(0, len(group), rows)):
            ids_BS = torch.from_numpy(np.stack([documents[d][s : s + length] for d, s in part]).astype(np.int64))
            targets_BS = F.pad(ids_BS[:, 1:], (0, 1), value=IGNORED)
            for row, (_, start) in zip(targets_BS, part, strict=True):
                row[: _context(start, sequence_length)] = IGNORED
            losses_BS, load = _losses(net, ids_BS.to(device), targets_BS.to(device))
            load_ME = load_ME + load if len(load_ME) else load
            for (d, start), row in zip(part, losses_BS, strict=True):
                new = _context(start, sequence_length)
                nats[d][start + new : start + length - 1] = row[new:-1]
            advance(ids_BS.numel())
    return nats, load_ME


def window_tokens(documents: Sequence[np.ndarray], sequence_length: int) -> int:
    """Tokens that `score` will read, overlaps counted twice."""
    lengths = [len(ids) for ids in documents]
    return sum(min(n - start, sequence_length) for n in lengths for start in _starts(n, sequence_length))


@torch.no_grad()
def diagnose(
    net: MoETransformer, documents: Sequence[np.ndarray], sequence_length: int, device: torch.device
) -> dict[str, float]:
    """How well the parts do that the loss does not show, on the first `sequence_length` tokens of each document.

    mtp_acceptance: how often greedy decoding would take the MTP block's draft; indexer_recall: share of dense attention
    that goes to the entries which the indexer would choose; router_entropy (nats) and sinkhorn_error: means, worst.
    What the model does not have is left out.
    """
    net.to(device).eval()
    figures: dict[str, list[float]] = {}
    for ids in documents:
        ids_1S = torch.from_numpy(ids[:sequence_length].astype(np.int64)).to(device)[None]
        out = net(ids_1S, with_mtp=True, sparse=False)
        found = {name: out.statistics[name].mean() for name in MEANS if name in out.statistics}
        if "sinkhorn_error" in out.statistics:
            found["sinkhorn_error"] = out.statistics["sinkhorn_error"].max()
        if out.mtp_hidden is not None and ids_1S.shape[1] > 1:
            draft_1S = F.linear(out.mtp_hidden, net.lm_head.weight).argmax(dim=-1)
            found["mtp_acceptance"] = (draft_1S[:, :-1] == out.logits.argmax(dim=-1)[:, 1:]).double().mean()
        for name, value in found.items():
            figures.setdefault(name, []).append(float(value))
    return {
        name: max(values) if name == "sinkhorn_error" else float(np.mean(values)) for name, values in figures.items()
    }


def _starts(length: int, window: int) -> range:
    """First tokens of the windows; a document of one token has nothing to score."""
    if length < 2:
        return range(0)
    step = _step(window)
    return range(0, max(length - window, 0) + step, step) if length > window else range(1)


def _step(window: int) -> int:
    return max(window // 2, 1)


def _context(start: int, window: int) -> int:
    """How many predictions of a window an earlier one has made already."""
    return window - 1 - _step(window) if start else 0


def _losses(net: MoETransformer, ids_BS: Tensor, targets_BS: Tensor) -> tuple[np.ndarray, Tensor]:
    out, counts_BS = net(ids_BS, with_logits=False), targets_BS != IGNORED
    losses_BS = torch.zeros(ids_BS.shape, device=ids_BS.device)
    losses_BS[counts_BS] = token_losses(out.hidden[counts_BS], net.lm_head.weight, targets_BS[counts_BS])
    return losses_BS.cpu().double().numpy(), out.expert_load.cpu()
