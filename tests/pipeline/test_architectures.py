"""DeepSeek-V3 through the stages that the demo runs with V4: pretrained, scored, exported, equal in transformers."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.params import load_params
from pipelines.pretrain import pretrain
from pipelines.tracking import Run

V3 = {
    "preset": "demo-v3", "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_v3_goes_from_tokens_to_an_export(reproduced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reproduced.folder
    monkeypatch.chdir(reproduced.copy(tmp_path / "project").folder)
    params = load_params(Path("params.yaml"))
    train = params.pretrain.model_copy(update={"model": V3, "optimizer": "adamw"})
    run = Run("pending-v3", "", None)
    metrics = pretrain(train, folder / "data/tokens", Path("v3"), Path("v3.csv"), run)
    curve = pd.read_csv("v3.csv")
    assert curve["indexer_loss"].isna().all() and curve["mtp_loss"].notna().all()
    assert metrics["loss_last"] < metrics["loss_first"] and "indexer_loss" not in metrics
    assert json.loads(Path("v3/config.json").read_text())["model_type"] == "deepseek_v3"
    data = (folder / "data/clean", folder / "data/chat", Path("reports"))
    found = evaluate(params.evaluate, ["en"], "base", Path("v3"), *data)
    assert 0 < found["bits_per_byte"] < 10 and found["health"].keys() == {"mtp_acceptance", "router_entropy"}
    parity = export(params, Path("v3"), *data, Path("release"), run)
    assert parity["passed"] and parity["max_logit_difference"] <= 1e-4
