"""How evenly tokens use their experts, and the loss that evens it out.

Shapes: B rows of S tokens, T = B S, E experts, K experts per token, X columns.

Sequence-wise balance (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20): the sum over experts of f_e P_e, of each
document; mean over tokens. f_e = E / (K n) times the tokens of the document that chose e, P_e = mean share of e's
affinity among all; 1 when every expert is taken alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def balance(
    indices_TK: Tensor, scores_TE: Tensor, first_BS: Tensor, real_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(load [E] int64, mean entropy of the shares in nats, loss). Only the loss has a gradient.

    Sums inside documents are differences of running sums, so that shapes depend on no data.
    """
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, indices_TK, 1.0)
    share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    real_T1 = share_TE.new_ones(len(share_TE), 1)
    if real_BS is not None:
        real_T1 = real_BS.reshape(-1, 1).to(share_TE)
        chosen_TE, share_TE = chosen_TE * real_T1, share_TE * real_T1
    count = real_T1.sum().clamp(min=1)
    entropy = -torch.xlogy(share_TE.detach(), share_TE.detach()).sum() / count
    inside = [_of_documents(x.unflatten(0, first_BS.shape), first_BS) for x in (chosen_TE, share_TE, real_T1)]
    chosen_BSE, share_BSE, n_BS1 = inside
    loss_BS = (chosen_BSE * share_BSE).sum(dim=-1) / n_BS1.squeeze(-1).clamp(min=1)  # n f P, but for E / K
    last_BS = F.pad(first_BS[:, 1:] != first_BS[:, :-1], (0, 1), value=True)
    loss = scores_TE.shape[1] / indices_TK.shape[1] * (loss_BS * last_BS).sum() / count
    return chosen_TE.sum(dim=0).to(torch.int64), entropy, loss


def _of_documents(x_BSX: Tensor, first_BS: Tensor) -> Tensor:
    """Sums from the first token of each token's document up to the token."""
    sums_BSX = F.pad(x_BSX.cumsum(dim=1), (0, 0, 1, 0))
    return sums_BSX[:, 1:] - sums_BSX.gather(1, first_BS.unsqueeze(-1).expand_as(x_BSX))
