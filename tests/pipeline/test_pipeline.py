"""The whole pipeline under DVC on little text: what runs, what is restored, what is registered and promoted."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from pipelines import card, compare, evaluate, models, review, stage, summary
from pipelines.params import load_params

STAGES = [
    "fetch",
    "clean",
    "contracts",
    "encode",
    "pretrain",
    "finetune",
    "baselines",
    "evaluate",
    "export",
    "agreement",
    "review",
]


def ran(output: str) -> set[str]:
    return {name.partition("@")[0] for name in re.findall(r"Running stage '([^']+)'", output)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def client(project) -> MlflowClient:
    uri = f"sqlite:///{project.folder}/.mlflow/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_the_first_repro_runs_every_stage(project) -> None:
    assert ran((project.folder / ".make/output").read_text()) == set(STAGES)
    metrics = project.read("reports/evaluate-base.json")
    assert 0 < metrics["ci95"][0] <= metrics["bits_per_byte"] <= metrics["ci95"][1] < 20
    assert 0 < metrics["baselines"]["xz"] < 8 and 0 < metrics["baselines"]["five_gram"] < 8
    assert all(abs(sum(shares) - 1) < 1e-9 for shares in metrics["expert_load"].values())


def test_runs_are_nested_below_one_parent_and_say_where_they_come_from(project, client) -> None:
    experiment = client.get_experiment_by_name("shovel").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parents = [run for run in runs.values() if "pipeline" in run.data.tags]
    assert len(parents) == 1
    stages = [run for run in runs.values() if run not in parents]
    assert len(stages) == len(STAGES) + 1
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {parents[0].info.run_id}
    assert {run.info.status for run in stages} == {"FINISHED"}
    pretrain = runs["pretrain"]
    assert pretrain.data.params["steps"] == "12" and pretrain.data.tags["dvc.stage"] == "pretrain"
    assert pretrain.data.tags["git.baseline"] == project.run("git", "rev-parse", "HEAD").stdout.strip()
    computed = [
        runs[name] for name in ("pretrain", "finetune", "evaluate-base", "evaluate-chat", "export", "agreement")
    ]
    assert {(run.data.tags["device"], run.data.tags["emulated"]) for run in computed} == {("cpu", "false")}
    assert all(json.loads(run.data.tags["kernels"])["grouped_matmul"] == "reference" for run in computed)
    lock = (project.folder / "dvc.lock").read_text()
    assert pretrain.data.tags["dvc.dep.data/tokens"] in lock
    assert runs["fetch"].data.tags["dvc.dep.data/sources.yaml"] in lock
    history = client.get_metric_history(pretrain.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(12))
    busiest = [point.value for point in client.get_metric_history(pretrain.info.run_id, "train/max_load_over_mean")]
    balance = project.read("reports/pretrain.json")["balance"]
    warm = busiest[balance["first_step"] :]
    assert (balance["busiest"], balance["above_twice"]) == (max(warm), sum(load > 2 for load in warm) / len(warm))
    assert {key: pretrain.data.metrics[f"balance/{key}"] for key in balance} == balance
    assert project.read("reports/runs/pretrain.json")["run_id"] == pretrain.info.run_id


def test_the_second_repro_runs_nothing(project) -> None:
    assert ran(project.run("dvc", "repro").stdout) == set()
    assert project.run("dvc", "status", "--json", "dvc.yaml").stdout.strip() == "{}"


def test_link_adds_commit_and_hashes(project, client) -> None:
    project.commit("first model")
    project.run("shovel", "link")
    run = client.get_run(project.read("reports/runs/pretrain.json")["run_id"])
    assert run.data.tags["git.commit"] == project.run("git", "rev-parse", "HEAD").stdout.strip()
    assert run.data.tags["dvc.out.data/models/base"].endswith(".dir")
    assert run.data.tags["dvc.dep.model"].endswith(".dir")
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FINISHED"


def test_the_review_page_needs_no_network(project) -> None:
    page = (project.folder / "reports/review.html").read_text()
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)
    assert "<script" not in page and page.count("data:image/svg+xml") == 4
    run_id = project.read("reports/runs/export.json")["run_id"]
    for word in ("shovel promote", "PSF-2.0", "5-gram", "more than twice an equal share", run_id):
        assert word in page


def test_where_no_answers_are_held_out_the_reports_are_json_and_everything_reads_them(
    reproduced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reproduced.copy(tmp_path / "project").folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nothing.db")
    params, reports, release = load_params(), Path("reports"), Path("data/models/release")
    none = evaluate.assistant_perplexity(None, None, Path("data/chat"), ["xx"], 64)
    json.dumps(none, allow_nan=False)
    both = {}
    for name in ("base", "chat"):
        both[name] = json.loads((reports / f"evaluate-{name}.json").read_text()) | none
        stage.write_json(reports / f"evaluate-{name}.json", both[name])
    review.review(params, release, reports, tmp_path / "page.html")
    card.write(tmp_path, params, models.load(release, "export").config, Path("data/clean"), Path("data/chat"), reports)
    description = summary.describe(reports, {"sources": []}, "", None)
    shutil.copy("params.yaml", reports)
    names = [row["name"] for row in compare.side_by_side(reports, reports)["figures"]]
    texts = [(tmp_path / name).read_text() for name in ("page.html", "README.md")]
    assert "perplexity" not in "".join([*texts, description, *names])


def test_register_is_idempotent_and_promote_asks_the_gates(project, client) -> None:
    project.run("shovel", "register")
    project.run("shovel", "register")
    versions = client.search_model_versions("name = 'shovel-demo'")
    assert len(versions) == 1
    weights = digest(project.folder / "data/models/release/model.safetensors")
    assert json.loads(versions[0].tags["lineage"])["digests"]["model.safetensors"] == weights
    assert (versions[0].tags["device"], versions[0].tags["emulated"]) == ("cpu", "false")
    source = client.list_artifacts(versions[0].run_id)
    assert "review.html" in {file.path for file in source}
    assert int(client.get_model_version_by_alias("shovel-demo", "challenger").version) == 1

    (project.folder / "stray.txt").write_text("not committed")
    refused = project.run("shovel", "promote", check=False)
    assert refused.returncode == 2 and "stray.txt not committed" in refused.stderr
    (project.folder / "stray.txt").unlink()

    export = project.folder / "reports/export.json"
    sound = export.read_text()
    export.write_text(json.dumps(json.loads(sound) | {"max_logit_difference": 0.1}))
    refused = project.run("shovel", "promote", check=False)
    assert refused.returncode == 2 and "export parity" in refused.stderr
    assert "`dvc status` names export" in refused.stderr
    export.write_text(sound)

    training = project.folder / "reports/pretrain.json"
    sound = json.loads(training.read_text())
    assert sound["audit"]["libraries"] > 5 and not sound["audit"]["nvidia_libraries"]
    training.write_text(json.dumps(sound | {"audit": sound["audit"] | {"nvidia_libraries": ["/lib/libcuda.so.1"]}}))
    refused = project.run("shovel", "promote", check=False)
    assert refused.returncode == 2 and "no NVIDIA part (pretrain loaded libcuda.so.1" in refused.stderr
    stage.write_json(training, sound)

    project.run("shovel", "promote")
    assert int(client.get_model_version_by_alias("shovel-demo", "champion").version) == 1
    record = json.loads(next((project.folder / "reports/releases").glob("shovel-demo-v1-*.json")).read_text())
    assert record["lineage"]["digests"]["model.safetensors"] == weights
    assert record["lineage"]["runs"] == {
        path.stem: project.read(f"reports/runs/{path.name}")["run_id"]
        for path in (project.folder / "reports/runs").iterdir()
    }
    assert all(gate["passed"] for gate in record["gates"]) and record["digest"] == versions[0].tags["digest"]
    assert "already" in project.run("shovel", "promote").stdout
    assert len(list((project.folder / "reports/releases").iterdir())) == 1


def test_experiments_register_nothing(project) -> None:
    refused = project.run("shovel", "register", check=False, DVC_EXP_NAME="sweep")
    assert refused.returncode == 2 and "experiments register nothing" in refused.stderr


def test_transformers_writes_with_the_release_without_this_project(project, tmp_path) -> None:
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'What is 1 plus 2?'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=8)\n"
        "assert not {'model', 'pipelines', 'moe_kernels'} & set(sys.modules)\n"
        "print(out.shape[1] - ids['input_ids'].shape[1])"
    )
    release = shutil.copytree(project.folder / "data/models/release", tmp_path / "release")
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(release)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert 1 <= int(done.stdout.strip()) <= 8


def test_one_parameter_of_finetune_reruns_nothing_before_it_and_comes_back_from_the_cache(project, client) -> None:
    before = digest(project.folder / "data/models/chat/model.safetensors")
    first_run = project.read("reports/runs/finetune.json")
    project.set_params(finetune={"learning_rate": 1e-4})
    done = project.run("dvc", "repro")
    assert ran(done.stdout) == {"finetune", "evaluate", "export", "agreement", "review"}
    assert digest(project.folder / "data/models/chat/model.safetensors") != before
    assert project.read("reports/runs/finetune.json") != first_run

    project.run("git", "checkout", "-q", "params.yaml")
    back = project.run("dvc", "repro")
    assert ran(back.stdout) == set()
    assert digest(project.folder / "data/models/chat/model.safetensors") == before
    assert project.read("reports/runs/finetune.json") == first_run


def test_a_second_version_rollback_and_previous(project, client) -> None:
    project.set_params(finetune={"learning_rate": 2e-4}, register={"margin_bits_per_byte": 5.0})
    project.run("dvc", "repro")
    project.commit("second model")
    project.run("shovel", "register")
    project.run("shovel", "promote")
    record = json.loads(next(project.folder.glob("reports/releases/*-v2-*.json")).read_text())
    documents = len(pd.read_csv(project.folder / "reports/plots/documents-chat.csv"))
    against = next(gate["what"] for gate in record["gates"] if gate["name"] == "not worse than the champion")
    assert f"against the champion on the {documents} documents of both, the margin is 5" in against
    assert int(client.get_model_version_by_alias("shovel-demo", "champion").version) == 2
    assert int(client.get_model_version_by_alias("shovel-demo", "previous").version) == 1
    project.run("shovel", "rollback")
    assert int(client.get_model_version_by_alias("shovel-demo", "champion").version) == 1
    assert int(client.get_model_version_by_alias("shovel-demo", "previous").version) == 2
    assert len(list((project.folder / "reports/releases").iterdir())) == 3


def test_push_clone_pull_is_clean(project, tmp_path) -> None:
    project.commit("everything")
    project.run("dvc", "remote", "add", "--local", "store", str(tmp_path / "store"))
    project.run("dvc", "push", "-r", "store")
    clone = tmp_path / "clone"
    project.run("git", "clone", "-q", str(project.folder), str(clone))
    environment = project.environment(PYTHONPATH=f"{clone}:{clone / 'kernels'}")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run(
        [*dvc, "remote", "add", "--local", "store", str(tmp_path / "store")], cwd=clone, env=environment, check=True
    )
    subprocess.run([*dvc, "pull", "-q", "-r", "store"], cwd=clone, env=environment, check=True)
    status = subprocess.run(
        [*dvc, "status", "--json", "dvc.yaml"], cwd=clone, env=environment, capture_output=True, text=True, check=True
    )
    assert status.stdout.strip() == "{}"
    assert digest(clone / "data/models/release/model.safetensors") == digest(
        project.folder / "data/models/release/model.safetensors"
    )
