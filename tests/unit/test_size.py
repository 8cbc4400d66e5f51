"""What a token costs, against a count over every query of a row."""

import pytest
import torch

from model import ModelConfig, count_parameters
from model.config import SLIDING, SPARSE
from model.size import flops_per_token

LENGTH = 4096


def multiply_adds(config: ModelConfig) -> int:
    """Of attention's products over one row, forwards: what each query may see, in every layer."""
    c, places = config, torch.arange(1, LENGTH + 1)
    if not c.is_v4:
        return c.num_hidden_layers * int(places.sum()) * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    total = 0
    for kind in c.layer_types:
        entries = torch.zeros_like(places) if kind == SLIDING else places // c.compress_rates[kind]
        chosen = entries.clamp(max=c.index_topk) if kind == SPARSE else entries
        total += int((places.clamp(max=c.sliding_window) + chosen).sum()) * 2 * c.num_attention_heads * c.head_dim
        total += int(entries.sum()) * c.index_n_heads * c.index_head_dim if kind == SPARSE else 0
    return total


@pytest.mark.parametrize("preset", ["demo", "demo-v3", "v3-671b", "v4-flash"])
def test_a_token_costs_its_parameters_and_what_it_attends_to(preset: str) -> None:
    config = ModelConfig.preset(preset).replace(num_nextn_predict_layers=0)
    attention = flops_per_token(config, LENGTH) - 6 * count_parameters(config)[1]
    assert attention == pytest.approx(6 * multiply_adds(config) / LENGTH, rel=0.01)
    assert flops_per_token(config.replace(num_nextn_predict_layers=1), LENGTH) > flops_per_token(config, LENGTH)
