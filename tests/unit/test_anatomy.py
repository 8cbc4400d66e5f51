"""What notebook 3 shows is what the layers compute."""

import pytest
import torch
from moe_kernels import hyper_read, window_attention

from model import ModelConfig, build
from model.anatomy import attention_parts, recall, sinkhorn_errors, stream_weights
from model.config import HEAVY, SLIDING, SPARSE
from model.context import Context

CONFIG = ModelConfig.preset("demo").replace(
    vocab_size=64,
    hidden_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    layer_types=[SLIDING, SPARSE, HEAVY],
    compress_rates={SPARSE: 4, HEAVY: 8},
    q_lora_rank=16,
    head_dim=16,
    qk_rope_head_dim=8,
    o_groups=1,
    o_lora_rank=8,
    sliding_window=16,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
    hc_mult=3,
    hc_sinkhorn_iters=4,
)


@pytest.fixture(scope="module")
def net():
    net = build(CONFIG, seed=1).eval()
    with torch.no_grad():
        for block in net.model.layers:
            block.self_attn.sinks.normal_()
            block.attn_hc.base.normal_()
    return net.requires_grad_(False)


def test_stream_weights_are_those_of_the_connection(net) -> None:
    x_1SND = torch.randn(1, 20, CONFIG.hc_mult, CONFIG.hidden_size)
    connection = net.model.layers[0].attn_hc
    ours = stream_weights(connection, x_1SND)
    rest = (CONFIG.rms_norm_eps, CONFIG.hc_sinkhorn_iters, CONFIG.hc_eps)
    h_SD, write_SN, mix_SNN = hyper_read(x_1SND[0], connection.fn, connection.base, connection.scale, *rest)
    torch.testing.assert_close(torch.einsum("sn,snd->sd", ours.read_SN, x_1SND[0]), h_SD)
    torch.testing.assert_close(ours.write_SN, write_SN)
    torch.testing.assert_close(ours.mix_SNN, mix_SNN)
    errors = sinkhorn_errors(ours, 8, CONFIG.hc_eps)
    assert errors[0] > errors[-1]
    assert errors[CONFIG.hc_sinkhorn_iters - 1] == pytest.approx(float((mix_SNN.sum(-1) - 1).abs().max()), abs=1e-6)


@pytest.mark.parametrize("kind", [SLIDING, SPARSE, HEAVY])
def test_attention_parts_are_what_the_layer_attends_to(net, kind, monkeypatch) -> None:
    """The layer's output is the value-weighted sum that the parts describe: checked on the mass that it reports."""
    attention = net.model.layers[CONFIG.layer_types.index(kind)].self_attn
    ids, x_1SD = torch.randint(64, (1, 70)), torch.randn(1, 70, CONFIG.hidden_size)
    parts, masses = attention_parts(attention, x_1SD, Context(CONFIG, ids)), []

    def recorded(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, mass = window_attention(*inputs)
        masses.append(mass)
        return out, mass

    monkeypatch.setattr("model.compressed_attention.window_attention", recorded)
    with torch.no_grad():
        attention(x_1SD, Context(CONFIG, ids), "layer")
    theirs = masses[0][0] / CONFIG.num_attention_heads
    torch.testing.assert_close(parts.far_ST, theirs)
    torch.testing.assert_close(parts.near_SS.sum(1) + parts.far_ST.sum(1) + parts.sink_S, torch.ones(70))
    assert parts.rate == CONFIG.compress_rates.get(kind, 0) and not parts.far_ST[~parts.chosen_ST].any()
    assert (parts.near_SS > 0).sum(1).max() == CONFIG.sliding_window


def test_recall_is_one_where_everything_is_chosen(net) -> None:
    attention = net.model.layers[CONFIG.layer_types.index(SPARSE)].self_attn
    context = Context(CONFIG, torch.randint(64, (1, 70)), sparse=False)
    dense = attention_parts(attention, torch.randn(1, 70, CONFIG.hidden_size), context)
    seen = dense.visible_ST.any(dim=1)
    assert torch.allclose(recall(dense, 70)[seen], torch.ones(int(seen.sum())))
    few = recall(dense, CONFIG.index_topk)[seen]
    assert 0 < few.min() < 1 and torch.allclose(few[: CONFIG.index_topk], torch.ones(CONFIG.index_topk))
