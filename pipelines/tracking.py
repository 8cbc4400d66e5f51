"""The only file that imports MLflow: runs of stages, their parent run, artifacts, and the way to the UI.

By default runs live in .mlflow/mlflow.db at the repository's root; MLFLOW_TRACKING_URI names any server instead.
A tracking server that is down does not stop a training: what it should have heard is kept in .mlflow/pending, and
`shovel link` delivers it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from pydantic import BaseModel

from pipelines import live, moved, pending, processes, repository
from pipelines.params import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from psutil import Process

EXPERIMENT = "shovel"
PARENT, NAME = "mlflow.parentRunId", "mlflow.runName"
BATCH, FLUSH_S = 500, 5.0
PIPELINES = {"dvc", "pipelines.commands.dvc", "pipelines.workbench.trials"}  # programs that run stages
PENDING = "pending-"  # begins the id of a run that no server knows yet
NOTE = """### How to decide whether a model goes live
1. *Model registry* (left), the version with the alias `challenger`: its description says how good it is, what it was
   trained on, and links to its **review page**: gates, champion and challenger side by side, samples, data, licences.
2. Curves: one run below is one pipeline, its stages nested in it; open `pretrain`, *Model metrics*.
3. In the repository: `shovel why N` tells where it comes from, `shovel verify N` checks bytes, signatures and lineage.
4. Say what you think: `shovel review N --comment "..."`. Decide: `shovel promote N --comment "why"`; take it back:
   `shovel rollback --comment "why"`. Do not move `champion` by hand: without a signed decision it is not served."""

for name, value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}.items():
    os.environ.setdefault(name, value)


class Deleted(UserError):
    """The experiment was deleted."""


def home() -> Path:
    """Where tracking keeps its files."""
    return repository.root() / ".mlflow"


def uri() -> str:
    """MLFLOW_TRACKING_URI, or the repository's own sqlite database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def is_local() -> bool:
    """Whether runs go to a database on this disk and not to a server."""
    return not uri().startswith("http")


def load() -> None:
    """Import what `connect` needs, two seconds, while something else is waited for."""
    import_module("mlflow.store.tracking.sqlalchemy_store" if is_local() else "mlflow")


def connect() -> MlflowClient:
    """A client whose database exists: the first use of an empty one happens behind a lock, one process at a time.

    Raises `UserError` when the server or the database does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints what it also raises
    home().mkdir(parents=True, exist_ok=True)
    with FileLock(lock_file()):
        try:
            client = MlflowClient(tracking_uri=uri(), registry_uri=uri())
            client.search_experiments(max_results=1)
            moved.follow(client.get_experiment_by_name(EXPERIMENT), uri(), home())
        except (MlflowException, OSError, SQLAlchemyError, sqlite3.Error) as error:
            raise UserError(
                f"{_where()} does not answer ({_reason(error)}); check it and MLFLOW_TRACKING_URI, and run again."
            ) from None
    return client


def lock_file() -> Path:
    """Beside an sqlite database, so that every repository which uses it takes the same lock; else our own."""
    scheme, _, path = uri().partition(":///")
    return Path(f"{path}.lock") if scheme == "sqlite" and Path(path).parent.is_dir() else home() / "lock"


def experiment_id(client: MlflowClient) -> str:
    """The experiment of this project, made on first use; raises `Deleted` when somebody deleted it."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        place = (home() / "artifacts").as_uri() if is_local() else None
        make = partial(client.create_experiment, EXPERIMENT, place, {"mlflow.note.content": NOTE})
        _unless(make, "RESOURCE_ALREADY_EXISTS")  # somebody else was faster
        found = client.get_experiment_by_name(EXPERIMENT)
    if found.lifecycle_stage == "deleted":
        command = f"MLFLOW_TRACKING_URI={uri()} mlflow experiments restore --experiment-id {found.experiment_id}"
        raise Deleted(f"{_where()} has the experiment {EXPERIMENT} among the deleted ones; `{command}` brings it back.")
    return found.experiment_id


class Run:
    """The MLflow run of one stage. Everything sent is buffered; nothing that is sent can stop a training."""

    def __init__(self, run_id: str, experiment_id: str, client: MlflowClient | None) -> None:
        self.run_id, self.experiment_id, self._client = run_id, experiment_id, client
        self._buffer: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()
        self._logged: dict[str, int] = {}
        self._afterwards: list[Callable[[], None]] = []

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Metrics of a step; a point that a resumed run has already is left out."""
        now = int(time.time() * 1000)
        fresh = {key: value for key, value in metrics.items() if step > self._logged.get(key, -1)}
        self._buffer += [(key, float(value), now, step) for key, value in fresh.items()]
        if len(self._buffer) >= BATCH or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered."""
        while self._buffer:
            self._send({"metrics": self._buffer[:BATCH]})
            self._buffer = self._buffer[BATCH:]
        self._flushed = time.monotonic()

    def tag(self, **tags: Any) -> None:
        """Tags of the run."""
        self._send({"tags": {key: str(value)[:5000] for key, value in tags.items()}})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A copy of a small file; weights do not belong here."""
        self._send({"artifact": str(path.resolve()), "folder": folder})

    def resume(self, key: str) -> None:
        """Continue the run of a killed process that trained the same thing, instead of this new one."""
        try:
            earlier = self._earlier(key) if self._client else None
            if earlier is not None and self._client is not None:
                self._continue(self._client, earlier)
        except Exception as error:  # noqa: BLE001  whatever is wrong with tracking, the training goes on
            _warn(error)
            self._client = None

    def _continue(self, client: MlflowClient, earlier: MlflowRun) -> None:
        logged = {
            name: max(point.step for point in client.get_metric_history(earlier.info.run_id, name))
            for name in earlier.data.metrics
        }
        tags = client.get_run(self.run_id).data.tags
        client.delete_run(self.run_id)
        self.run_id, self._logged = earlier.info.run_id, logged
        self._send({"status": "RUNNING"})
        self._send({"tags": {name: tags[name] for name in (PARENT, *processes.tags()) if name in tags}})

    def when_finished(self, action: Callable[[], None]) -> None:
        """Do this once everything that the run makes is written: dropping checkpoints, for example."""
        self._afterwards.append(action)

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        self.flush()
        self._send({"status": status})
        for action in self._afterwards if status == "FINISHED" else ():
            action()

    def _earlier(self, key: str) -> MlflowRun | None:
        query = f"tags.checkpoint_key = '{key}' and attributes.run_id != '{self.run_id}'"
        runs = self._client.search_runs([self.experiment_id], query, order_by=["attributes.start_time DESC"])
        return next(
            (
                run
                for run in runs
                if run.info.status != "FINISHED" and not processes.is_alive(run.data.tags.get("process", ""))
            ),
            None,
        )

    def _send(self, message: dict[str, Any]) -> None:
        """To the server, or into a file when it does not answer; the rest of the run goes there too, in order."""
        if self._client:
            try:
                _deliver(self._client, self.run_id, message)
                return
            except Exception as error:  # noqa: BLE001  whatever is wrong with tracking, the training goes on
                _warn(error)
                self._client = None
        pending.add(self.run_id, message)


@contextmanager
def stage_run(label: str, section: BaseModel | None) -> Iterator[Run]:
    """The run of a stage, below the run of its pipeline; it ends FINISHED, FAILED or KILLED."""
    run = _start(label, section)
    try:
        yield run
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException as error:
        run.tag(error=f"{type(error).__name__}: {error}")
        run.end("FAILED")
        raise
    run.end("FINISHED")


def _start(label: str, section: BaseModel | None) -> Run:
    tags = _tags(label, section)
    params = _flat_params(section)
    try:
        client = connect()
        reap(client)
        experiment = experiment_id(client)
        parent = _parent(client, experiment)
        tags |= {PARENT: parent} if parent else {}
        run = Run(client.create_run(experiment, tags=tags, run_name=label).info.run_id, experiment, client)
    except Exception as error:  # noqa: BLE001  a server that is down must not stop the pipeline
        _warn(error)
        run = Run(f"{PENDING}{uuid.uuid4().hex}", "", None)
        run._send({"create": label, "tags": tags, "start": int(time.time() * 1000)})
    run._send({"params": params})
    return run


def _parent(client: MlflowClient, experiment: str) -> str | None:
    """The run of the `dvc repro` that started this process, made by its first stage."""
    pipeline = _pipeline_process()
    if pipeline is None:
        return None
    identity = processes.identity(pipeline)
    with FileLock(home() / "parent.lock"):
        found = client.search_runs([experiment], f"tags.pipeline = '{identity}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {"pipeline": identity, "process": identity, "git.baseline": repository.commit(), **live.tags()}
        if experiment_name := os.environ.get("DVC_EXP_NAME"):
            tags["dvc.exp_name"] = experiment_name
        name = tags.get("run") or experiment_name or f"pipeline {repository.commit()[:7]}".strip()
        return client.create_run(experiment, tags=tags, run_name=name).info.run_id


def _pipeline_process() -> Process | None:
    """The nearest ancestor that runs stages: a `dvc` command, or a run in a folder of its own."""
    return processes.ancestor(lambda words: bool(PIPELINES & set(words)))


def reap(client: MlflowClient) -> int:
    """End the runs whose process is gone: KILLED, and a pipeline as its stages ended. Returns how many."""
    found = client.get_experiment_by_name(EXPERIMENT)
    running = client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'") if found else []
    dead = [run for run in running if not processes.is_alive(run.data.tags.get("process", ""))]
    for run in sorted(dead, key=lambda run: "pipeline" in run.data.tags):
        status = _of_stages(client, run) if "pipeline" in run.data.tags else "KILLED"
        client.set_terminated(run.info.run_id, status)
    return len(dead)


def _of_stages(client: MlflowClient, pipeline: MlflowRun) -> str:
    query = f"tags.`{PARENT}` = '{pipeline.info.run_id}'"
    stages = {run.info.status for run in client.search_runs([pipeline.info.experiment_id], query)}
    return next((status for status in ("KILLED", "FAILED") if status in stages), "FINISHED")


def _tags(label: str, section: BaseModel | None) -> dict[str, str]:
    """Everything that says where a run comes from."""
    stage = os.environ.get("DVC_STAGE", "")
    text = section.model_dump_json() if section else "{}"
    tags = processes.tags() | live.tags()
    tags |= {
        "stage": label,
        "git.baseline": repository.commit(),
        "git.dirty": str(bool(repository.uncommitted_sources())).lower(),
        "params.sha256": hashlib.sha256(text.encode()).hexdigest(),
        "host": platform.node(),
        "mlflow.source.name": f"pipelines/{label.split('-')[0]}.py",
    }
    tags |= {f"dvc.dep.{path}": md5 for path, md5 in repository.dependency_hashes(stage).items()}
    named = {"dvc.stage": stage, "dvc.exp_name": os.environ.get("DVC_EXP_NAME", "")}
    return tags | {key: value for key, value in named.items() if value}


def _flat_params(section: BaseModel | None) -> dict[str, str]:
    """Parameters as MLflow takes them: at most 100, text of at most 6,000 characters."""
    content = section.model_dump() if section else {}
    nested = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key, value in nested.items():
        del content[key]
        content |= {f"{key}.{inner}": element for inner, element in value.items()}
    return {key: str(value)[:6000] for key, value in list(content.items())[:100]}


def _deliver(client: MlflowClient, run_id: str, message: dict[str, Any]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    match message:
        case {"metrics": points}:
            client.log_batch(run_id, metrics=[Metric(*point) for point in points])
        case {"params": params}:
            client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
        case {"tags": tags}:
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        case {"artifact": path, "folder": folder}:
            client.log_artifact(run_id, path, folder or None)
        case {"status": "RUNNING"}:
            client.update_run(run_id, status="RUNNING")
        case {"status": status}:
            client.set_terminated(run_id, status)


def sync_pending(client: MlflowClient) -> tuple[int, int]:
    """Deliver what servers have missed; returns how many runs that concerns, and how many wait as they still go on.

    May be repeated after an outage in its midst: a run is made once, and points that are there already stay single. A
    run that had to be made keeps the id by which reports/runs knows it as the tag `provisional_id`.
    """
    delivered = waiting = 0
    for file in sorted(pending.home().glob("*.jsonl")):
        messages = pending.read(file)
        if pending.goes_on(messages):
            waiting += 1
        elif not messages:
            file.unlink()
        elif run_id := _late_run(client, file.stem, messages[0]):
            for message in messages:
                if "create" not in message and ("artifact" not in message or Path(message["artifact"]).exists()):
                    _deliver(client, run_id, message)
            file.unlink()
            delivered += 1
        else:
            print(f"tracking   no run is known for {file}; delete it if nobody needs it", file=sys.stderr)
    return delivered, waiting


def _late_run(client: MlflowClient, run_id: str, first: dict[str, Any]) -> str | None:
    """The run that the messages are for, made where there is none; None when they do not say what it is."""
    found = find_run(client, run_id)
    if found is None and "create" in first:
        tags = first["tags"] | {"provisional_id": run_id}
        found = client.create_run(experiment_id(client), first["start"], tags, first["create"])
    return found.info.run_id if found else None


def _warn(error: Exception) -> None:
    why = str(error)[:-1] if isinstance(error, Deleted) else f"{_where()} does not answer ({_reason(error)})"
    print(f"tracking   {why}; this run is kept in {pending.home()}, `shovel link` delivers it later", file=sys.stderr)


def _where() -> str:
    return "the local tracking database" if is_local() else f"the tracking server {uri()}"


def _reason(error: Exception) -> str:
    """The first line of an error, short; of a chain the innermost says most."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def trouble(error: BaseException | None) -> str | None:
    """The sentence for a server that went away or refuses, None for any other error."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return None
    if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return f"{_where()} refuses: {error.message.removeprefix('PERMISSION_DENIED: ')}."
    if "failed with exception" in error.message:
        return f"{_where()} does not answer ({_reason(error)}); run the same command again when it does."
    return None


def create_model(client: MlflowClient, name: str, description: str, tags: dict[str, str] | None = None) -> bool:
    """A registered model of that name; False when there was one."""
    make = partial(client.create_registered_model, name, tags, description)
    return _unless(make, "RESOURCE_ALREADY_EXISTS") is not None


def find_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model of that name, None when there is none."""
    return _unless(partial(client.get_registered_model, name), "RESOURCE_DOES_NOT_EXIST")


def delete_model(client: MlflowClient, name: str, tags: dict[str, str]) -> None:
    """Delete a registered model if it still has these tags and the server answers and allows it."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):
        if client.get_registered_model(name).tags == tags:
            client.delete_registered_model(name)


def version_behind(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The model version that an alias names, None when it names none."""
    find = partial(client.get_model_version_by_alias, name, alias)
    return _unless(find, "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _unless(request: Callable[[], Any], *codes: str) -> Any:
    """What the server answers, None when it refuses with one of the error codes."""
    from mlflow.exceptions import MlflowException

    try:
        return request()
    except MlflowException as error:
        if error.error_code not in codes:
            raise
        return None


def find_run(client: MlflowClient, run_id: str | None) -> MlflowRun | None:
    """The run, None when this server does not know it (it was made with another one), or when somebody deleted it."""
    if run_id and run_id.startswith(PENDING):
        found = client.search_runs([experiment_id(client)], f"tags.provisional_id = '{run_id}'", max_results=1)
        return found[0] if found else None
    unknown = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
    run = _unless(partial(client.get_run, run_id), *unknown) if run_id else None
    return run if run and run.info.lifecycle_stage == "active" else None


def seconds(client: MlflowClient, run_ids: Mapping[str, str]) -> dict[str, float]:
    """How long each run took, by its label; those that this server does not know, or that still run, are left out."""
    runs = {label: find_run(client, run_id) for label, run_id in run_ids.items()}
    ended = {label: run.info for label, run in runs.items() if run and run.info.end_time}
    return {label: (info.end_time - info.start_time) / 1000 for label, info in ended.items()}


def tag_version(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str]) -> ModelVersion:
    """Set the tags of a model version; returns it with them."""
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)
    return client.get_model_version(version.name, version.version)


def upload(client: MlflowClient, run_id: str, folder: Path, name: str) -> None:
    """A folder of small files as the artifact `name` of a run."""
    client.log_artifacts(run_id, str(folder), name)


def download(client: MlflowClient, run_id: str | None, name: str, into: Path) -> Path | None:
    """The artifact folder `name` of a run, copied below `into`; None when the server has none."""
    from mlflow.exceptions import MlflowException

    try:
        known = run_id and client.list_artifacts(run_id, name)
    except MlflowException:
        known = None
    return Path(client.download_artifacts(run_id, name, str(into))) if known else None


def page_of(client: MlflowClient, version: ModelVersion) -> Path:
    """The review page of a version, copied into .mlflow/pages. Raises `UserError` when the server has none."""
    from mlflow.exceptions import MlflowException

    folder = home() / "pages" / f"{version.name}-{version.version}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client.download_artifacts(version.run_id, "review.html", str(folder)))
    except (MlflowException, OSError):
        raise UserError(f"{_where()} holds no review page of version {version.version} of {version.name}.") from None


def ui_address(port: int) -> str:
    """The training view of a server on this machine."""
    return f"http://127.0.0.1:{port}/#/experiments/{experiment_id(connect())}/runs?workflowType=machine_learning"


def ui_command(port: int) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of the MLflow server for this repository's database: this machine only, one worker."""
    if not is_local():
        raise UserError(f"MLFLOW_TRACKING_URI is {uri()}; open that address, there is nothing to start here.")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri(), "--artifacts-destination", str(home() / "artifacts")]
    return command, {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
