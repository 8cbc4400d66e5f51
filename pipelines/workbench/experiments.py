"""DVC's experiments and MLflow's runs in one table: one row a pipeline, an experiment, or a run with overrides."""

from __future__ import annotations

from typing import Any

import pandas as pd

from pipelines import tracking

FIGURES = ("loss_last", "bits_per_byte", "assistant_perplexity", "tokens_per_s")
COLUMNS = ["name", "kind", "created", "status", "commit", "overrides"]


def table() -> pd.DataFrame:
    """See `project.experiments`; without a tracking server only what DVC knows, and the other way round."""
    rows = tracking.pipelines(FIGURES)
    known = _of_dvc()
    for row in rows:
        row |= known.pop(row["name"], {})
    found = pd.DataFrame([*rows, *known.values()])
    columns = [*COLUMNS, *(name for name in found.columns if name not in COLUMNS)]
    return found.reindex(columns=columns).sort_values("created", ascending=False, ignore_index=True)


def _of_dvc() -> dict[str, dict[str, Any]]:
    """Experiments by name, with the parameters that differ from the commit they start from."""
    from dvc.api import exp_show

    found = {}
    rows = exp_show()
    for row in rows:
        if row.get("typ") == "branch_commit" or not row.get("Experiment"):
            continue
        found[row["Experiment"]] = {"name": row["Experiment"], "kind": "experiment", "created": row.get("Created")}
    return found
