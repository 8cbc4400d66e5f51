"""The notebook's surface on little text: try, watch, interrupt, keep, compare, propose, review, promote, roll back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pipelines import project as surface
from pipelines.cli import app
from pipelines.params import UserError

ROOT = Path(__file__).parents[2]


def client_of(project) -> MlflowClient:
    uri = f"sqlite:///{project.folder}/.mlflow/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def status_of(project, stage: str) -> str:
    return project.run("dvc", "status", "--json", stage).stdout.strip()


def shovel(*words: str) -> str:
    """What a command prints; in this process, as a terminal would have it."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_public_name_helps_with_an_example() -> None:
    for name in surface.__all__:
        text = getattr(surface, name).__doc__
        assert text and len(text.splitlines()[0]) < 120
    for name in ("run", "keep", "compare", "model", "propose", "review", "watch", "attach", "experiments", "stages"):
        assert ">>> " in getattr(surface, name).__doc__, name


def test_a_run_leaves_everything_as_it_is_and_keeping_it_makes_what_dvc_would_make(here) -> None:
    assert set(surface.stages()["state"]) == {"fresh"}
    here.commit("first model")
    before, params = here.digests("data/models", "reports"), (here.folder / "params.yaml").read_text()
    run = surface.run("finetune", learning_rate=np.float64(2e-4), languages=["en"])
    assert run.status == "finished" and run.params["finetune"]["learning_rate"] == 2e-4
    assert here.digests("data/models", "reports") == before
    assert (here.folder / "params.yaml").read_text() == params
    assert here.run("git", "status", "--porcelain").stdout == ""
    assert list(run.curve.index) == list(range(6)) and {"loss", "tokens_per_s"} <= set(run.curve)
    assert run.seconds > run.progress.seconds

    stage_run = client_of(here).get_run(run.mlflow_ids["finetune"])
    assert stage_run.data.tags["overrides"] == "finetune.learning_rate=0.0002, finetune.languages=['en']"
    parent = client_of(here).get_run(stage_run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == run.id == stage_run.data.tags["run"]
    assert stage_run.data.tags["dvc.dep.data/models/base"] in (here.folder / "dvc.lock").read_text()

    found = surface.compare("workspace", run)
    assert found.params.loc["finetune.learning_rate"].tolist() == [5e-4, 2e-4]
    assert "finetune/loss_last" in found.metrics.index and ("finetune", run.id) in found.curves
    change = f"{found.metrics.loc['finetune/loss_last', 'change']:+.1%}"
    assert change in repr(found) and change in found._repr_html_()
    assert found.data.loc["code.kept"].nunique() == 1

    made = surface.keep(run)
    assert made.in_place == ["finetune"] and not made.again
    assert status_of(here, "finetune") == "{}"
    content = YAML(typ="safe").load(here.folder / "params.yaml")
    assert content["finetune"]["learning_rate"] == 2e-4
    assert (here.folder / "params.yaml").read_text().startswith("# One section a stage")
    kept = here.digests("data/models/chat")
    assert kept != {path: before[path] for path in kept}
    lock = YAML(typ="safe").load(here.folder / "dvc.lock")["stages"]["finetune"]["outs"][0]["md5"]
    here.run("dvc", "repro", "--single-item", "--force", "finetune")
    assert here.digests("data/models/chat") == kept, "a forced rerun makes the same bytes"
    assert YAML(typ="safe").load(here.folder / "dvc.lock")["stages"]["finetune"]["outs"][0]["md5"] == lock
    assert surface.stages().loc["finetune", "state"] == "fresh"
    assert surface.stages().loc["evaluate@chat", "why"] == "data/models/chat changed"


def test_from_a_kept_run_to_champion_and_back(here) -> None:
    run = surface.attach(surface.runs().index[0])
    here.commit("kept")
    with pytest.raises(UserError, match=r"`shovel run` first"):
        surface.propose(run)
    done = here.run("dvc", "repro")
    assert "Running stage 'finetune'" not in done.stdout and "Running stage 'review'" in done.stdout
    here.commit("second model")
    first = surface.propose(run)
    assert (first.role, first.version) == ("challenger", 1)
    page = surface.review()
    assert page.gates["holds"].all() and page.page.name == "review.html" and "<iframe" in page._repr_html_()
    assert surface.promote().role == "champion"
    with pytest.raises(UserError, match="no previous champion"):
        surface.rollback()
    assert surface.compare("champion", "workspace").params.empty


def test_a_second_version_through_the_command_line(here) -> None:
    said = shovel("run", "finetune", "--set", "steps=4", "--set", "warmup_steps=1", "--keep")
    assert "params.yaml now has finetune.steps=4, finetune.warmup_steps=1" in said
    done = here.run("shovel", "run")
    assert "finetune   " not in done.stderr and "review     " in done.stderr
    here.commit("third model")
    proposed = json.loads(shovel("propose", "--json"))
    assert (proposed["version"], proposed["role"]) == (2, "challenger")
    compared = json.loads(shovel("compare", "champion", "challenger", "--json"))
    assert compared["params"]["finetune.steps"] == {"champion": 6, "challenger": 4}
    reviewed = json.loads(shovel("review", "2", "--json"))
    assert reviewed["version"]["version"] == 2 and all(gate["holds"] for gate in reviewed["gates"])
    shovel("promote")
    assert "version 1 is the champion again" in shovel("rollback")
    assert surface.model("champion").folder != Path("data/models/release"), "from DVC's cache"
    table = json.loads(shovel("experiments", "--json"))
    kinds = {row["kind"] for row in table}
    assert kinds == {"pipeline", "run"} and any(row["evaluate-chat/bits_per_byte"] for row in table)


def test_a_run_goes_on_while_mlflow_is_down_and_is_delivered_later(here, monkeypatch, capsys) -> None:
    with monkeypatch.context() as down:
        down.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        run = surface.run("finetune", steps=3, warmup_steps=1)
    assert run.status == "finished" and "`shovel link` delivers it later" in capsys.readouterr().err
    assert "1 delivered late" in CliRunner().invoke(app, ["link"]).output
    late = client_of(here).search_runs(["1"], "tags.provisional_id LIKE 'pending-%'", order_by=["start_time DESC"])[0]
    assert late.data.tags["overrides"] == "finetune.steps=3, finetune.warmup_steps=1"
    assert len(client_of(here).get_metric_history(late.info.run_id, "train/loss")) == 3


def test_a_model_writes_scores_and_shows_its_experts_as_transformers_computes_them(here) -> None:
    ours = surface.model("release")
    tokenizer = AutoTokenizer.from_pretrained(here.folder / "data/models/release")
    theirs = AutoModelForCausalLM.from_pretrained(here.folder / "data/models/release").eval()
    text = "def f(x):\n    return x"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = theirs(ids).logits[0, :-1].double()
    nats = -logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    scored = ours.score([text, "import os"])
    assert scored.loc[0, "nats"] == pytest.approx(nats, rel=1e-4) and scored.loc[0, "tokens"] == ids.shape[1] - 1
    assert scored.loc[0, "bits_per_byte"] == pytest.approx(nats / len(text) / np.log(2), rel=1e-4)

    chosen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(theirs.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out, n=number: chosen.update({n: out}))
    with torch.no_grad():
        theirs(ids)
    table = ours.experts(text).table
    assert set(table["layer"]) == set(chosen) and table["position"].nunique() == ids.shape[1]
    for number, out in chosen.items():
        indices = next(part for part in out if part.dtype == torch.int64)
        rows = table[table["layer"] == number].groupby("position")["expert"].agg(set)
        assert rows.tolist() == [set(row) for row in indices.view(ids.shape[1], -1).tolist()]
    assert len(ours.chat("What is 1 plus 2?", max_new_tokens=4)) > 0
    assert ours.generate("def", 4, temperature=0) == ours.generate("def", 4, temperature=0)
    for name, value in (("temperature", -1), ("temperature", np.inf), ("max_new_tokens", -1), ("seed", 2**70)):
        with pytest.raises(UserError, match=rf"{name}.*\.$"):
            ours.generate("def", **{name: value})
    for message in ({"role": "user"}, {"role": "foo", "content": "Hello"}, {"content": "Hello"}, "Hello", {}):
        with pytest.raises(UserError, match="is no message; write .*, the role user or assistant"):
            ours.chat([message])
    with pytest.raises(UserError, match="names no model"):
        surface.model("nothing")
