"""DVC's experiments and MLflow's runs in one table: one row a pipeline, an experiment, or a run with overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pandas as pd

from pipelines import repository, stage, tracking
from pipelines.params import UserError
from pipelines.workbench.comparison import at_revision

FIGURES = ("loss_last", "bits_per_byte", "assistant_perplexity", "tokens_per_s")
COLUMNS = ["name", "kind", "created", "status", "commit", "overrides"]
REFERENCE = re.compile(r"refs/exps/(?P<base>[0-9a-f]{2}/[0-9a-f]{38})/(?P<name>[^/]+)")


def table() -> pd.DataFrame:
    """See `project.experiments`; where the tracking server does not answer, that is said beside what DVC knows."""
    known = {row["name"]: row for row in _of_dvc()}
    try:
        rows = _of_mlflow(tracking.connect())
    except UserError as error:
        if not known:
            raise
        stage.say(f"tracking   {error}")
        rows = []
    rows = [known.pop(row["name"], {}) | {key: value for key, value in row.items() if value != ""} for row in rows]
    found = pd.DataFrame([*rows, *known.values()])
    columns = [*COLUMNS, *(name for name in found.columns if name not in COLUMNS)]
    return found.reindex(columns=columns).sort_values("created", ascending=False, ignore_index=True)


def _of_mlflow(client: tracking.MlflowClient) -> list[dict[str, Any]]:
    """One row a pipeline or run with overrides, with the figures of its stages; one a stage that was run by hand."""
    tracking.reap(client)
    rows: dict[str, dict[str, Any]] = {}
    for run in _all_runs(client):
        tags = run.data.tags
        row = rows.setdefault(tags.get(tracking.PARENT, run.info.run_id), {})
        row |= _described(run) if tracking.PARENT not in tags else {}
        if "stage" in tags:
            row |= {f"{tags['stage']}/{key}": value for key, value in run.data.metrics.items() if key in FIGURES}
    return [row for row in rows.values() if "name" in row]


def _described(run: tracking.MlflowRun) -> dict[str, Any]:
    tags = run.data.tags
    kind = "run" if "overrides" in tags else "experiment" if "dvc.exp_name" in tags else "pipeline"
    return {
        "name": run.info.run_name,
        "kind": "stage" if "stage" in tags else kind,
        "created": datetime.fromtimestamp(run.info.start_time / 1000),
        "status": run.info.status.lower(),
        "commit": tags.get("git.baseline", "")[:7],
        "overrides": tags.get("overrides", ""),
        "run_id": run.info.run_id,
    }


def _all_runs(client: tracking.MlflowClient) -> Iterator[tracking.MlflowRun]:
    """Of this project, the newest first."""
    token = None
    while token is None or token:
        page = client.search_runs([tracking.experiment_id(client)], max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def _of_dvc() -> list[dict[str, Any]]:
    """One row an experiment: what differs from the commit it starts from, and all figures of its state."""
    listed = repository.git("for-each-ref", "--format=%(refname) %(committerdate:unix)", "refs/exps").splitlines()
    rows = []
    for reference, seconds in (line.split() for line in listed):
        if found := REFERENCE.fullmatch(reference):
            base, name = found["base"].replace("/", ""), found["name"]
            mine, before = at_revision(name, reference), at_revision("base", base)
            changed = [f"{key}={value}" for key, value in mine.params.items() if before.params.get(key) != value]
            figures = {key: value for key, value in mine.metrics.items() if key.rpartition("/")[2] in FIGURES}
            row = {"name": name, "kind": "experiment", "created": datetime.fromtimestamp(int(seconds))}
            row |= {"status": "finished", "commit": base[:7], "overrides": ", ".join(changed)}
            rows.append(row | {key: value for key, value in figures.items() if key.count("/") == 1})
    return rows
