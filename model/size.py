"""How large a model is, and what a token costs: from the config alone, nothing is allocated."""

from __future__ import annotations

from model.config import HEAVY, SLIDING, SPARSE, ModelConfig


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active per token) of the trunk. Active leaves out the embedding look-up and experts not visited."""
    c = config
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    moe_layers = c.num_hidden_layers - c.first_moe_layer
    fixed = sum(_attention_parameters(c, layer) for layer in range(c.num_hidden_layers))
    fixed += c.num_hidden_layers * (2 * c.hidden_size + 2 * _hyper_connection_parameters(c)) + c.hidden_size
    fixed += c.first_moe_layer * 3 * c.hidden_size * c.intermediate_size + _hyper_head_parameters(c)
    fixed += moe_layers * (c.n_shared_experts * expert + c.n_routed_experts * c.hidden_size)
    vocabulary = c.vocab_size * c.hidden_size
    total = fixed + moe_layers * c.n_routed_experts * expert + 2 * vocabulary
    return total, fixed + moe_layers * c.num_experts_per_tok * expert + vocabulary


def count_mtp_parameters(config: ModelConfig) -> int:
    """What the multi-token prediction block adds; it shares embedding and head with the trunk."""
    c = config
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    moe = (c.n_shared_experts + c.n_routed_experts) * expert + c.n_routed_experts * c.hidden_size
    block = _attention_parameters(c, None) + 2 * c.hidden_size + 2 * _hyper_connection_parameters(c) + moe
    outside = 2 * c.hidden_size**2 + 3 * c.hidden_size + _hyper_head_parameters(c)
    return c.num_nextn_predict_layers * (block + outside)


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs of one token, forward and backward: 6 per active parameter, the MTP block's included, plus
    attention: causal in V3; in V4 the window, and the compressed entries of the past that a query looks at."""
    c = config
    active = count_parameters(c)[1]
    if c.num_nextn_predict_layers:
        idle = (c.n_routed_experts - c.num_experts_per_tok) * 3 * c.hidden_size * c.moe_intermediate_size
        active += count_mtp_parameters(c) - idle + c.vocab_size * c.hidden_size
    if not c.is_v4:
        heads = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
        layers = c.num_hidden_layers + c.num_nextn_predict_layers
        return 6 * active + 6 * layers * heads * sequence_length / 2
    width = 2 * c.num_attention_heads * c.head_dim
    pairs = (c.num_hidden_layers + c.num_nextn_predict_layers) * _mean_seen(sequence_length, c.sliding_window) * width
    for kind in c.layer_types:
        if kind != SLIDING:
            entries = sequence_length / c.compress_rates[kind]
            pairs += _mean_seen(entries, c.index_topk if kind == SPARSE else entries) * width
            pairs += _mean_seen(entries, entries) * c.index_n_heads * c.index_head_dim if kind == SPARSE else 0
    return 6 * active + 6 * pairs


def _mean_seen(length: float, most: float) -> float:
    """Mean over a row of what a query attends to: everything before it, but no more than `most`."""
    most = min(most, length)
    return most - most**2 / (2 * length)


def _attention_parameters(c: ModelConfig, layer: int | None) -> int:
    """Of one layer; None: the MTP block's."""
    heads, d = c.num_attention_heads, c.hidden_size
    if not c.is_v4:
        query_in = c.q_lora_rank or d
        query = query_in * heads * c.qk_head_dim + (d * query_in + query_in if c.q_lora_rank else 0)
        key_value = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
        key_value += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        return query + key_value + heads * c.v_head_dim * d
    rank = c.q_lora_rank
    query = d * rank + rank + rank * heads * c.head_dim
    out = c.o_lora_rank * heads * c.head_dim + d * c.o_groups * c.o_lora_rank
    plain = query + d * c.head_dim + c.head_dim + out + heads
    kind = SLIDING if layer is None else c.layer_types[layer]
    if kind == SLIDING:
        return plain
    compressor = _compressor_parameters(c, kind, c.head_dim)
    if kind == HEAVY:
        return plain + compressor
    indexer = rank * c.index_n_heads * c.index_head_dim + d * c.index_n_heads
    return plain + compressor + indexer + _compressor_parameters(c, kind, c.index_head_dim)


def _compressor_parameters(c: ModelConfig, kind: str, width: int) -> int:
    """Projections of values and gates, position bias, norm; the overlapping one has two halves."""
    channels = width * (2 if kind == SPARSE else 1)
    return 2 * channels * c.hidden_size + c.compress_rates[kind] * channels + width


def _hyper_connection_parameters(c: ModelConfig) -> int:
    rows = (2 + c.hc_mult) * c.hc_mult
    return rows * c.hc_mult * c.hidden_size + rows + 3 if c.is_v4 else 0


def _hyper_head_parameters(c: ModelConfig) -> int:
    return c.hc_mult * c.hc_mult * c.hidden_size + c.hc_mult + 1 if c.is_v4 else 0
