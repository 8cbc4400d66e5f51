"""One thread and no model hub for every test; small projects and the default corpus as fixtures."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import dvc.logger  # noqa: F401  its handlers write for ever to the stderr of its import, which no test may own
import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))
from commands import forked  # noqa: E402

from pipelines.moved import readdress  # noqa: E402

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}
os.environ.pop("MLFLOW_TRACKING_URI", None)

ROOT = Path(__file__).parents[1]
HARDWARE = ("an Ascend card", "a device that Triton compiles for")  # what some tests need
SMALL = {
    "clean": {"heldout_percent": 15.0},
    "contracts": {"min_documents": 10, "max_overlap_rate": 0.4, "max_secret_rate": 0.5},
    "encode": {"vocab_size": 400},
    "pretrain": {
        "steps": 12,
        "batch_tokens": 256,
        "start_batch_tokens": 128,
        "batch_ramp_steps": 3,
        "sequence_length": 64,
        "warmup_steps": 2,
        "dense_attention_steps": 2,
        "checkpoint_every": 2,
    },
    "finetune": {"steps": 6, "batch_tokens": 256, "sequence_length": 64, "checkpoint_every": 2},
    "agreement": {"documents": 8, "float32": {"kl": 2e-7, "top1_agreement": 0.95, "difference": 0.1}},
    "evaluate": {"sequence_length": 64, "max_bytes": 60_000, "sample_tokens": 4},
}
MODEL = {
    "preset": "demo", "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "q_lora_rank": 16,
    "head_dim": 16, "qk_rope_head_dim": 8, "o_groups": 1, "o_lora_rank": 8, "sliding_window": 16, "index_n_heads": 2,
    "index_head_dim": 8, "index_topk": 4, "hc_mult": 2, "hc_sinkhorn_iters": 3, "n_routed_experts": 4,
}  # fmt: skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tests that only hardware can run are listed by name, not lost among the skipped ones."""
    for need in HARDWARE:
        skipped = terminalreporter.stats.get("skipped", [])
        waiting = [report for report in skipped if f"needs {need}" in report.longreprtext]
        if waiting:
            terminalreporter.section(f"NOT RUN: {len(waiting)} tests need {need}")
            for report in waiting:
                terminalreporter.line(f"  {report.nodeid}")


class Project:
    """A copy of this repository in its own git repository, with little text and a tiny model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, MODEL

    @classmethod
    def create(cls, folder: Path) -> "Project":
        """A new one, committed, with nothing run yet."""
        project = cls(folder)
        project._write_files()
        project._write_text()
        project.set_params(**SMALL)
        project.set_params(pretrain={"model": MODEL})
        project.run("git", "init", "-q")
        project.run("dvc", "config", "--local", "core.analytics", "false")
        project.commit("start")
        return project

    def _write_files(self) -> None:
        folder = self.folder
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in files.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith(("tests/", "dvc.lock", "reports/")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / "reports").mkdir()
        for name in (".gitignore", "profile.json"):
            (folder / "reports" / name).write_bytes((ROOT / "reports" / name).read_bytes())

    def copy(self, folder: Path) -> "Project":
        """The same state elsewhere, its runs and its release included; MLflow's artifacts are the copy's own."""
        copy = Project(Path(shutil.copytree(self.folder, folder, symlinks=True)))
        if (folder / ".mlflow/mlflow.db").exists():
            old, new = (f"{place.resolve().as_uri()}/" for place in (self.folder, folder))
            readdress(folder / ".mlflow/mlflow.db", old, new)
        return copy

    def digests(self, *folders: str) -> dict[str, str]:
        """sha256 of every file below the folders, by path."""
        files = (path for folder in folders for path in sorted((self.folder / folder).rglob("*")) if path.is_file())
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A command in a process group of its own, as a terminal starts it, output in one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=self.folder, env=self.environment(**environment),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def _write_text(self) -> None:
        own = self.folder / "data" / "own"
        (own / "code").mkdir()
        library = Path(sysconfig.get_path("stdlib"))
        modules = sorted(path for path in library.glob("[a-h]*.py") if 2_000 < path.stat().st_size < 30_000)[:45]
        for path in modules:
            (own / "code" / path.name).write_bytes(path.read_bytes())
        turns = [("user", "assistant")[k % 2] for k in range(2)]
        with (own / "talk.jsonl").open("w") as file:
            for n in range(60):
                contents = (f"What is {n} plus {n + 1}?", f"{n} plus {n + 1} is {2 * n + 1}.")
                messages = [{"role": r, "content": c} for r, c in zip(turns, contents, strict=True)]
                file.write(json.dumps({"messages": messages}) + "\n")
        code = {"name": "code", "path": "data/own/code", "licence": "PSF-2.0", "language": "code", "use": "pretrain"}
        talk = {"name": "talk", "path": "data/own/talk.jsonl", "licence": "CC0-1.0", "language": "en", "use": "chat"}
        self.set_sources(code | {"kind": "path"}, talk | {"kind": "path"})

    def set_sources(self, *entries: dict) -> None:
        (self.folder / "data" / "sources.yaml").write_text(json.dumps({"sources": entries}))

    def set_params(self, **sections: dict) -> None:
        from ruamel.yaml import YAML

        yaml = YAML()
        content = yaml.load((self.folder / "params.yaml").read_text())
        for name, changes in sections.items():
            content[name] |= changes
        with (self.folder / "params.yaml").open("w") as file:
            yaml.dump(content, file)

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", *command] if command[0] in ("dvc", "mlflow") else list(command)
        words = [sys.executable, *command[1:]] if command[0] == "python" else words
        if command[0] == "shovel":
            done = forked(words[1:], self.folder, self.environment(**environment))
        else:
            done = subprocess.run(
                words, cwd=self.folder, env=self.environment(**environment), capture_output=True, text=True
            )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.folder}{os.pathsep}{self.folder / 'kernels'}"
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PYTHONPATH": path, "PATH": binaries, **more}

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", message)

    def read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` that `make` fills, shared by all workers of pytest-xdist."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.done").exists():
            folder.mkdir()
            make(folder)
            Path(f"{folder}.done").touch()
    return folder


@pytest.fixture(scope="module", autouse=True)
def key_of_nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody's own key signs: that of each file of tests is made by its first use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
        yield


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after its first `dvc repro`, what that printed in .make/output; for copies only, leave it as it is."""

    def make(folder: Path) -> None:
        output = Project.create(folder).run("dvc", "repro").stdout
        (folder / ".make").mkdir()
        (folder / ".make" / "output").write_text(output)

    return Project(made_once(tmp_path_factory, "reproduced", make))


@pytest.fixture(scope="module")
def project(reproduced: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of `reproduced`, for the tests of one file to share, in a folder with a blank and an accent."""
    return reproduced.copy(tmp_path_factory.mktemp("project") / "mon é")


@pytest.fixture(scope="session")
def create_project() -> Callable[[Path], Project]:
    """Makes a project in a folder, with nothing run yet."""
    return Project.create


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """`project` with this process in it, as the kernel of a notebook is."""
    from pipelines.workbench import kernel

    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(kernel, "check", lambda: None)  # somebody may work on the code while tests run
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    return project


@pytest.fixture
def fresh_project(tmp_path: Path) -> Project:
    return Project.create(tmp_path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default sources, fetched (downloads are kept), cleaned and encoded: folders raw, clean, chat, tokens."""
    from pipelines.clean import clean
    from pipelines.encode import encode
    from pipelines.fetch import fetch
    from pipelines.params import load_params

    def make(folder: Path) -> None:
        params = load_params(ROOT / "params.yaml")
        fetch(params.fetch, ROOT / "data/sources.yaml", folder / "raw", ROOT / ".downloads")
        clean(params.clean, folder / "raw", folder / "clean", folder / "chat")
        encode(params.encode, folder / "clean", folder / "tokens")

    return made_once(tmp_path_factory, "corpus", make)
