"""Train = export = serve: what the trained module, transformers and the server say of the same held-out prompts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines import agreement, gates, models, stage
from pipelines.params import load_params


@pytest.fixture
def here(project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project.folder)
    return load_params()


def test_the_stage_compares_several_lengths_languages_and_dialogues(project, here) -> None:
    found = project.read("reports/agreement.json")
    assert len(found["lengths"]) > 2 and found["languages"] == ["code", "en"]
    assert gates.agrees(found["transformers"], found["limits"]) and gates.agrees(found["server"], found["limits"])
    assert found["server"]["positions"] > found["transformers"]["positions"] > 400  # the server also writes
    kinds = {
        prompt.kind for prompt in agreement.prompts(here.agreement, agreement.TUNED, agreement.CLEAN, agreement.CHAT)
    }
    assert kinds == {"document", "dialogue"}
    page = (project.folder / "reports/review.html").read_text().replace("\u2011", "-")
    assert "train = serve" in page and gates.distances(found["server"]) in page


def test_a_server_with_another_rotary_base_is_stopped_by_the_gate(project, here, tmp_path: Path) -> None:
    """Only the served copy is wrong: the export itself is sound, and its gate holds."""
    served = Path(shutil.copytree(agreement.RELEASE, tmp_path / "served"))
    config = json.loads((served / "config.json").read_text())
    for kind in config["rope_parameters"].values():
        kind["rope_theta"] = 10.0
    (served / "config.json").write_text(json.dumps(config))
    folders = (agreement.TUNED, agreement.RELEASE, agreement.CLEAN, agreement.CHAT)
    report = agreement.agreement(here.agreement, *folders, served=served)
    kept = Path(shutil.copytree("reports", tmp_path / "reports"))
    stage.write_json(kept / "agreement.json", report)
    failed = [gate.name for gate in gates.of_reports(here, kept, None) if not gate.passed]
    assert failed == ["train = serve"]


def test_distances_are_those_of_the_whole_distribution(here) -> None:
    """KL over the most likely tokens and the rest as one is below the whole KL and close to it; NaN never agrees."""
    net = models.load(agreement.TUNED, made_by="finetune")
    theirs = AutoModelForCausalLM.from_pretrained(agreement.RELEASE, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(1.1)
        ids = torch.arange(5, 45)[None]
        ours_SV, theirs_SV = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (net, theirs))
    whole = (ours_SV.exp() * (ours_SV - theirs_SV)).sum(-1).mean().item()
    best = theirs_SV.topk(20)
    found = agreement.compare(net, iter([agreement.Answer(ids[0].tolist(), best.indices, best.values)]))
    assert 0 < found["kl"] <= whole and found["positions"] == 39
    limits = here.agreement.float32.model_dump()
    assert not gates.agrees(found, limits) and not gates.agrees(found | {"kl": float("nan")}, {**limits, "kl": 1e9})
