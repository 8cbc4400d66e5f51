"""The hot operations of a mixture-of-experts transformer, one function each.

`reference/` in plain PyTorch defines what each operation means; `npu/` computes the same through torch_npu's fused
operators, `cpu/` by C++ that is compiled once for a machine, `triton/` by Triton on every other accelerator.
`dispatch.py` picks by the device of the first tensor; `device.py` is the only place that names devices.

Shapes: B batch, S queries, T tokens or keys, D hidden size or channels, H heads, R rotary channels, E experts,
K experts per token, N = T * K routed rows (in hyper-connections: residual streams), F width of an expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.dispatch import chosen, decodes, implementation, reference_only, withhold
from moe_kernels.reference.adamw import AdamW, AdamWState
from moe_kernels.reference.newton_schulz import COEFFICIENTS, Coefficients

__all__ = [
    "AdamW",
    "AdamWState",
    "adamw_step",
    "attention",
    "balance",
    "cached_window_attention",
    "chosen",
    "cross_entropy",
    "cross_entropy_with_gradient",
    "decode_compressed_attention",
    "decode_experts",
    "decode_latent_attention",
    "decodes",
    "expert_load",
    "experts",
    "grouped_matmul",
    "hyper_head",
    "hyper_read",
    "hyper_write",
    "index_scores",
    "linear",
    "newton_schulz",
    "permute",
    "reference_only",
    "rms_norm",
    "rotate",
    "route",
    "skinny_linear",
    "swiglu",
    "unpermute",
    "window_attention",
    "withhold",
]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in the dtype of `x`; arXiv 1910.07467, equation 4.

    weight: None means ones.
    """
    return implementation("rms_norm", x.device.type)(x, weight, eps)


def rotate(x_BSHR: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, inverse: bool = False) -> Tensor:
    """Rotate each adjacent pair of the last channels, as many as cosine and sine have; the channels before stay.

    cos, sin: fp32 [B or 1, S, 1, R / 2], one angle per pair. inverse: by the negative angle. arXiv 2104.09864.
    """
    return implementation("rotate", x_BSHR.device.type)(x_BSHR, cos_BS1R, sin_BS1R, inverse)


def swiglu(gate_up_N2F: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up for the halves of the last axis, [..., 2F] -> [..., F]; arXiv 2002.05202, equation 6.

    limit: clamps the gate from above and up from both sides before they meet.
    """
    return implementation("swiglu", gate_up_N2F.device.type)(gate_up_N2F, limit)


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    *,
    chosen_TK: Tensor | None = None,
    score: str = "sigmoid",
    groups: int = 1,
    top_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [T, K] int64, weights [T, K], affinities to all experts [T, E]), in fp32 whatever the autocast.

    score: "sigmoid" (arXiv 2412.19437, equations 15 and 16) or "sqrt_softplus", the square root of softplus. The bias
    only selects. groups, top_groups: experts come from the `top_groups` groups whose two best score highest. chosen:
    experts that are given, in place of a bias.
    """
    choose = implementation("route", x_TD.device.type)
    return choose(x_TD, weight_ED, bias_E, chosen_TK, top_k, score, groups, top_groups, normalise, scale)


def balance(
    indices_TK: Tensor, scores_TE: Tensor, first_BS: Tensor, real_BS: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """How evenly B rows of S tokens use their experts: (load [E] int64, entropy, loss); T = B S.

    scores: affinities to all experts. first: index in its row of the first token of each token's document. real: which
    tokens count; None: all. entropy: of a token's shares of affinity, mean in nats. loss: the balance loss inside each
    document, mean over tokens (arXiv 2412.19437, equations 17 to 20); it alone has a gradient, by the scores.
    """
    return implementation("balance", scores_TE.device.type)(indices_TK, scores_TE, first_BS, real_BS)


def expert_load(indices_TK: Tensor, num_experts: int) -> Tensor:
    """Rows that each expert gets, [E] int64; does not wait for the device, as a bincount would."""
    return implementation("expert_load", indices_TK.device.type)(indices_TK, num_experts)


def permute(x_TD: Tensor, indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [N, D] sorted by expert, place [T, K] of each choice among them, rows of each expert [E] int64)."""
    return implementation("permute", x_TD.device.type)(x_TD, indices_TK, num_experts)


def unpermute(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D], the weighted sum of each token's K rows, accumulated in fp32, in the dtype of `y_ND`."""
    return implementation("unpermute", y_ND.device.type)(y_ND, places_TK, weights_TK)


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """x @ weight[e]^T for the rows of each expert e: the first counts[0] rows belong to expert 0, and so on; [N, F]."""
    return implementation("grouped_matmul", x_ND.device.type)(x_ND, weight_EFD, counts_E)


def experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Mixture of SwiGLU experts, [T, D] -> [T, D], in the dtype of autocast where that is on, else of `x_TD`.

    indices_TK: int64, the experts of each token. weights_TK: fp32, their mixing weights. gate_up: gate rows first.
    limit: as for `swiglu`.
    """
    return implementation("experts", x_TD.device.type)(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF, limit)


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x weight^T over the last axis, in the dtype of autocast where that is on, else of `x`."""
    return implementation("linear", x.device.type)(x, weight_OD)


def attention(
    q_BSHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float, document_ids_BT: Tensor | None = None
) -> Tensor:
    """Causal softmax attention, [B, S, H, V]; the queries are the last S of the T tokens. V is at most D.

    document_ids: tokens see each other inside a run of equal ids, each document in one piece; None means one document
    a row.
    """
    return implementation("attention", q_BSHD.device.type)(q_BSHD, k_BTHD, v_BTHV, scale, document_ids_BT)


def index_scores(q_BSJI: Tensor, weights_BSJ: Tensor, keys_BTI: Tensor, visible_BST: Tensor) -> Tensor:
    """The lightning indexer's score of every entry for every token: sum_j w_j relu(q_j . k), [B, S, T] fp32.

    J indexer heads of I channels; weights in fp32. Entries that are not visible [B, S, T] score -1e30. DeepSeek-V3.2,
    arXiv 2512.02556, equation 1.
    """
    return implementation("index_scores", q_BSJI.device.type)(q_BSJI, weights_BSJ, keys_BTI, visible_BST)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignored: int = -100) -> Tensor:
    """-log softmax(logits)[target] of each token in nats, fp32 [T]; 0 where the target is `ignored`."""
    return implementation("cross_entropy", logits_TV.device.type)(logits_TV, targets_T, ignored)


def cross_entropy_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """(the same losses [T], the gradient of `scale` times their sum [T, V] in the dtype of the logits).

    scale: fp32, one number. For callers that need both at once, before any backward pass: nothing here is recorded.
    """
    both = implementation("cross_entropy_with_gradient", logits_TV.device.type)
    return both(logits_TV, targets_T, scale, ignored)


def window_attention(
    q_BSHD: Tensor, kv_BSD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, window_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V4's attention of queries over their own rows: (out [B, S, H, D], attention of each entry [B, S, T]).

    kv: the one key of a token, which is its value too. entries: compressed ones, visible [B, S, T] says to whom.
    window [B or 1, S, 2 W]: what each token sees of the chunk of W tokens before its own, and of its own. sinks: a
    logit a head that takes attention and has no value. The second result is summed over heads and has no gradient.
    """
    attend = implementation("window_attention", q_BSHD.device.type)
    return attend(q_BSHD, kv_BSD, entries_BTD, sinks_H, window_BSK, visible_BST)


def cached_window_attention(
    q_BSHD: Tensor, kv_BKD: Tensor, entries_BTD: Tensor, sinks_H: Tensor, allowed_BSK: Tensor, visible_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """The same over any keys, with what each query may see of them [B, S, K]."""
    attend = implementation("cached_window_attention", q_BSHD.device.type)
    return attend(q_BSHD, kv_BKD, entries_BTD, sinks_H, allowed_BSK, visible_BST)


def skinny_linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x weight^T, [T, O], for few rows: a row's result does not depend on how many there are."""
    return implementation("skinny_linear", x_TD.device.type)(x_TD, weight_OD)


def decode_experts(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor | None,
    chosen_TK: Tensor | None,
    routed: Sequence[Tensor],
    shared: Sequence[Tensor],
    top_k: int,
    *,
    score: str = "sigmoid",
    groups: int = 1,
    top_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
    limit: float | None = None,
) -> Tensor:
    """Router, routed experts and shared expert of a decoding step or a prompt, [T, D] -> [T, D]; no gradients.

    routed: (gate_up, down) as for `experts`; shared: (gate, up, down) of one expert that all rows take. chosen: experts
    that are given, in place of a bias; the rest as for `route`.
    """
    decode = implementation("decode_experts", x_TD.device.type)
    how = (score, groups, top_groups, normalise, scale, limit)
    return decode(x_TD, router_ED, bias_E, chosen_TK, routed, shared, top_k, *how)


def decode_latent_attention(
    x_BSD: Tensor,
    lengths_B: Tensor,
    ends_B: Tensor,
    query: Sequence[Tensor],
    key_value: Sequence[Tensor],
    output_DX: Tensor,
    values_BNX: Tensor,
    positions_BN: Tensor,
    frequencies_R: Tensor,
    factor: float,
    scale: float,
    heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Multi-head latent attention of a decoding step or a prompt, [B, S, D] -> [B, S, D]; no gradients.

    lengths, ends: row b's tokens are those of positions lengths[b] up to ends[b], at most S; past them the result is 0.
    query: (down, norm, up), or one matrix. key_value: (down [C + R, D], norm [C], up [H (N + V), C]). output: [D, H V].
    values, positions: a cache of C + R channels by position, filled in place; its last slot takes what is not kept.
    frequencies: angles a position of the R rotary channels' pairs; factor: of their cosines and sines.
    """
    decode = implementation("decode_latent_attention", x_BSD.device.type)
    cache = (values_BNX, positions_BN)
    numbers = (frequencies_R, factor, scale, heads, eps)
    return decode(x_BSD, lengths_B, ends_B, query, key_value, output_DX, *cache, *numbers)


def decode_compressed_attention(
    x_BSD: Tensor,
    lengths_B: Tensor,
    ends_B: Tensor,
    weights: Sequence[Tensor],
    compression: Sequence[Tensor],
    indexing: Sequence[Tensor],
    caches: Sequence[Tensor],
    frequencies_R: Tensor,
    groups: int,
    top_k: int,
    eps: float,
) -> Tensor:
    """DeepSeek-V4's attention of a decoding step or a prompt, [B, S, D] -> [B, S, D]; no gradients.

    lengths, ends, frequencies: as for `decode_latent_attention`. weights: query down, norm, up; key, norm; output a
    group [groups * L, H C / groups], output; sinks. compression: values, gates, bias [M, X], norm of a layer with
    compressed entries, X = 2 C where blocks overlap. indexing: the same of the indexer, then its queries and weights of
    its heads; it chooses `top_k` entries. caches: values and positions of the window, then of the compressor's tokens
    and of its entries, then the same of the indexer, as many as there are; filled in place.
    """
    decode = implementation("decode_compressed_attention", x_BSD.device.type)
    given = (weights, compression, indexing, caches)
    return decode(x_BSD, lengths_B, ends_B, *given, frequencies_R, groups, top_k, eps)


def hyper_read(
    x_TND: Tensor, fn_PC: Tensor, base_P: Tensor, scale_3: Tensor, norm_eps: float, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Hyper-connections, before a sub-layer: (what it reads [T, D], write [T, N], mix [T, N from, N to]), all fp32.

    fn, base, scale: the maps to P = (2 + N) N coefficients a token, C = N D. iterations: of Sinkhorn-Knopp.
    """
    read = implementation("hyper_read", x_TND.device.type)
    return read(x_TND, fn_PC, base_P, scale_3, norm_eps, iterations, eps)


def hyper_head(x_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, norm_eps: float, eps: float) -> Tensor:
    """Hyper-connections, after the last sub-layer: the streams read into one, [T, N, D] -> [T, D], all fp32."""
    return implementation("hyper_head", x_TND.device.type)(x_TND, fn_NC, base_N, scale_1, norm_eps, eps)


def hyper_write(x_TND: Tensor, y_TD: Tensor, write_TN: Tensor, mix_TNN: Tensor) -> Tensor:
    """Hyper-connections, after it: x'_k = sum_j mix[j, k] x_j + write_k y, [T, N, D]."""
    return implementation("hyper_write", x_TND.device.type)(x_TND, y_TD, write_TN, mix_TNN)


def newton_schulz(x_Nrc: Tensor, coefficients: Coefficients = COEFFICIENTS, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of each X = U S V^T, nearly: [N, r, c] -> [N, r, c] in the dtype of `x_Nrc`.

    coefficients: (a, b, c) of each step. dtype: of the matrix products; None: that of `x_Nrc`.
    """
    return implementation("newton_schulz", x_Nrc.device.type)(x_Nrc, coefficients, dtype)


def adamw_step(weights: list[Tensor], gradients: list[Tensor], state: AdamWState, numbers: AdamW) -> None:
    """One step of AdamW in place on lists of tensors of one device; arXiv 1711.05101, algorithm 2."""
    implementation("adamw_step", weights[0].device.type)(weights, gradients, state, numbers)
