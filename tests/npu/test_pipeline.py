"""The stages on `npu`, as in `make demo DEVICE=npu`: what breaks is resumed, and what comes out is registered."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from mlflow import MlflowClient
from moe_kernels import device

from model import load_pretrained

PRETRAIN = ("python", "-m", "pipelines.pretrain")
EVERY, TRACE = 2, ".make/trace"  # steps between checkpoints, operators of the unbroken training
emulated = pytest.mark.skipif(not device.emulated(), reason="provokes faults that only the emulator has")


@pytest.fixture(scope="module")
def encoded(create_project, tmp_path_factory: pytest.TempPathFactory):
    """A project with its tokens, and the weights of an unbroken training."""
    project = create_project(tmp_path_factory.mktemp("npu") / "project")
    project.set_params(pretrain={"checkpoint_every": EVERY})
    project.run("dvc", "repro", "encode")
    (project.folder / TRACE).parent.mkdir()
    passport = "import torch; from pipelines.machine.environment import require_passport as r; r(torch.device('npu'))"
    project.run("python", "-c", passport)  # so that the trace is that of the training alone
    project.run(*PRETRAIN, FAKECANN_TRACE=str(project.folder / TRACE))
    return project


def steps_behind(project) -> int:
    """Of the newest checkpoint."""
    found = (project.folder / ".checkpoints" / "pretrain").glob("*/step-*")
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def sentence(done: CompletedProcess[str]) -> str:
    """What a person reads last of a stage that failed: one line, and no traceback before it."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@emulated
def test_each_fault_ends_in_one_sentence_and_the_training_goes_on(encoded, tmp_path: Path) -> None:
    """An operator that fails, an error that comes late, too little memory, a lost device; then the unbroken weights."""
    project = encoded.copy(tmp_path / "broken")
    weights = project.digests("data/models/base")
    calls = operators_of_a_step(project)
    faults = [
        ({"FAKECANN_FAULT": f"operator:aclnnRmsNorm:{4 * calls['aclnnRmsNorm']}"}, "ERR00100"),
        ({"FAKECANN_FAULT": f"async:aclnnGroupedMatmulV5:{4 * calls['aclnnGroupedMatmulV5']}"}, "ERR"),
        ({"FAKECANN_HBM_GIB": "0.003"}, "out of memory"),
        ({"FAKECANN_FAULT": f"lost:{2 * sum(calls.values())}"}, "ERR"),
    ]
    behind = 0
    for settings, said in faults:
        found = sentence(project.run(*PRETRAIN, check=False, **settings))
        assert found.startswith("pretrain: Ascend910B1 (emulated) failed: ") and said in found
        assert found.endswith("lower `pretrain.micro_batch_tokens` if memory is short.") == ("memory" in said)
        assert behind <= steps_behind(project) and f"continues from step-{steps_behind(project):08d}" in found
        behind = steps_behind(project)
    project.run(*PRETRAIN)
    assert project.digests("data/models/base") == weights and steps_behind(project) == 0


def operators_of_a_step(project) -> Counter[str]:
    """Calls of each operator in the unbroken training, divided by its steps."""
    steps = project.read("reports/pretrain.json")["steps"]
    names = Counter((project.folder / TRACE).read_text().split())
    return Counter({name: calls // steps for name, calls in names.items()})


@pytest.fixture(scope="module")
def registered(encoded, tmp_path_factory: pytest.TempPathFactory):
    project = encoded.copy(tmp_path_factory.mktemp("registered") / "project")
    project.run("dvc", "repro")
    project.run("shovel", "register")
    return project, client_of(project).get_model_version("shovel-demo", "1")


def client_of(project) -> MlflowClient:
    uri = f"sqlite:///{project.folder / '.mlflow' / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_the_version_says_where_it_was_computed(registered) -> None:
    project, version = registered
    assert (version.tags["device"], version.tags["emulated"]) == ("npu", str(device.emulated()).lower())
    assert re.fullmatch("[0-9a-f]{64}", version.tags["passport"]), version.tags
    assert version.tags["passport"] == project.read("reports/pretrain.json")["passport"]


@emulated
def test_nothing_of_an_emulated_run_is_a_speed(registered) -> None:
    project, _ = registered
    client = client_of(project)
    (experiment,) = (e for e in client.search_experiments() if e.name == "shovel")
    runs = {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}
    for name in ("pretrain", "finetune"):
        assert runs[name].data.tags["emulated"] == "true"
        assert not [key for key in runs[name].data.metrics if re.search("tokens_per_s|share_of_peak|seconds", key)]
        assert [file.path for file in client.list_artifacts(runs[name].info.run_id) if file.path.endswith(".html")]
    assert "time on an emulated device, which says nothing of a real one" in project.run("shovel", "why", "1").stdout


def test_the_export_has_the_same_logits_here_and_on_the_cpu(registered) -> None:
    project, _ = registered
    net = load_pretrained(project.folder / "data" / "models" / "release")
    ids = torch.arange(4, 68).remainder(net.config.vocab_size)[None]
    with torch.no_grad():
        theirs = net(ids).logits
        ours = net.to("npu")(ids.to("npu")).logits.cpu()
    assert (ours - theirs).abs().max() < 1e-4
