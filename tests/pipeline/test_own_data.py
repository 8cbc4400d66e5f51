"""Text of a user's own under the real `dvc repro`: four formats are read, poisoned text is stopped before training."""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

OWN = {"kind": "path", "licence": "CC-BY-4.0", "language": "en", "use": "pretrain"}


def entries(project) -> list[dict]:
    return project.read("data/sources.yaml")["sources"]


def modules(project) -> list[Path]:
    return sorted((project.folder / "data/own/code").glob("*.py"))


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


@pytest.fixture
def restored(project):
    """The shared project; what a test put into it is gone afterwards."""
    project.commit("before")
    yield project
    project.run("git", "checkout", "-q", ".")
    project.run("git", "clean", "-qfd", "data/own")
    project.run("dvc", "checkout", "-q")


def duplicated(project) -> None:
    for path in modules(project):
        path.with_name(f"again_{path.name}").write_bytes(path.read_bytes())


def leaked(project) -> None:
    """One of two documents of an evaluation source lies in the training text, inside a longer file."""
    exam = project.folder / "data/own/exam"
    exam.mkdir()
    for name in ("known", "unknown"):
        lines = [f"{name}_{n} = {name}_{n * n} + len('question {n} of the {name} exam')" for n in range(60)]
        (exam / f"{name}.py").write_text("\n".join(lines) + "\n")
    whole = "# Preface.\n" + (exam / "known.py").read_text() + "\n# Epilogue.\n"
    (project.folder / "data/own/code/notes.py").write_text(whole)
    exam_entry = OWN | {"name": "exam", "path": "data/own/exam", "language": "code", "use": "eval"}
    project.set_sources(*entries(project), exam_entry)


@pytest.mark.parametrize(
    ("poison", "sentence"),
    [
        (
            duplicated,
            "raw documents are rarely copies of one another (share of the worst source, code); found 0.5, limit",
        ),
        (leaked, "13-word runs that training text knows (share of the worst source, exam); found 0.5"),
    ],
)
def test_poison_is_stopped_before_training(restored, poison, sentence: str) -> None:
    poison(restored)
    before = restored.digests("data/tokens", "data/models") | restored.digests("reports/contracts.html")
    done = restored.run("dvc", "repro", check=False)
    assert done.returncode != 0 and stages_run(done.stdout) == ["fetch", "clean", "contracts"]
    assert sentence in done.stderr, done.stderr
    assert "open reports/contracts-failed.html" in done.stderr
    assert "Traceback" not in done.stderr
    assert restored.digests("data/tokens", "data/models") | restored.digests("reports/contracts.html") == before
    assert "Nothing was trained" in (restored.folder / "reports/contracts-failed.html").read_text()


def test_four_formats_of_text_of_ones_own(restored) -> None:
    own = restored.folder / "data/own/mine"
    own.mkdir()
    words = {name: f"{name} " + " ".join(f"word{n * n} of {name}" for n in range(40)) for name in ("txt", "md")}
    for name, text in words.items():
        (own / f"page ü.{name}").write_text(text, encoding="utf-8")
    (own / "lines.jsonl").write_text("\n".join(json.dumps({"text": f"{n} jsonl {words['md']}"}) for n in range(2)))
    pd.DataFrame({"text": [f"{n} parquet {words['txt']}" for n in range(3)]}).to_parquet(own / "rows.parquet")
    restored.set_sources(*entries(restored), OWN | {"name": "mine", "path": "data/own/mine"})
    restored.run("dvc", "repro", "clean")
    table = pd.read_parquet(restored.folder / "data/clean/documents.parquet")
    mine = table[table["source"] == "mine"]
    assert sorted(mine["path"]) == [
        "lines.jsonl#1", "lines.jsonl#2", "page ü.md", "page ü.txt", "rows.parquet#1", "rows.parquet#2",
        "rows.parquet#3",
    ]  # fmt: skip
    assert set(mine["licence"]) == {"CC-BY-4.0"} and words["md"] in set(mine["text"])


@pytest.fixture
def pipe(restored):
    """A named pipe in data/own, which git does not clean."""
    path = restored.folder / "data/own/code/pipe"
    os.mkfifo(path)
    yield path
    path.unlink()


def test_what_dvc_cannot_read_is_named_and_nothing_is_lost(restored, pipe) -> None:
    own = restored.folder / "data/own"
    (own / "dangling.txt").symlink_to("nowhere")
    (own / "fine.txt").symlink_to("talk.jsonl")
    Path(os.fsdecode(os.fsencode(own) + b"/caf\xe9.txt")).touch()
    (own / "code/second").symlink_to("second")
    before = restored.digests("data/raw", "reports")
    for words in ("run", "run fetch --set timeout_s=9", "status"):
        done = restored.run("shovel", *words.split(), check=False)
        assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
            "shovel: data/own/caf\\xe9.txt has a name that is not UTF-8; data/own/dangling.txt is a link to nothing; "
            "data/own/code/pipe is neither a file nor a folder, and 1 more; mend or remove that, DVC reads all of "
            "data/own."
        )
    assert restored.digests("data/raw", "reports") == before


def test_an_experiment_leaves_runs_but_no_version(restored) -> None:
    rate = "finetune.learning_rate=0.0003"
    done = restored.run("dvc", "exp", "run", "-n", "warmer", "-S", rate)
    assert "finetune" in stages_run(done.stdout) and "pretrain" not in stages_run(done.stdout)
    assert "warmer" in restored.run("dvc", "exp", "show", "--csv").stdout
    uri = f"sqlite:///{restored.folder}/.mlflow/mlflow.db"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("shovel").experiment_id
    runs = client.search_runs([experiment], "tags.`dvc.exp_name` = 'warmer' and tags.stage = 'finetune'")
    assert len(runs) == 1 and runs[0].data.params["learning_rate"] == "0.0003"
    assert client.search_registered_models() == []
