"""Two states of the project side by side, and all experiments in one table.

A state is a run, `workspace`, a git revision, a DVC experiment, or an alias or number of the registry; of the latter
four, what git keeps is read: params.yaml and reports/.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from pipelines import live, register, repository, stage, tracking
from pipelines.params import Params, UserError
from pipelines.workbench import display
from pipelines.workbench.runs import Run

CURVES = ("pretrain", "finetune")
SHOWN: dict[str, Any] = {"na_rep": "", "formatters": {"change": "{:+.1%}".format}}
REPORTS = ("clean", "encode", "pretrain", "finetune", "baselines", "evaluate-base", "evaluate-chat", "export", "review")


@dataclass(frozen=True)
class State:
    """name: as it was asked for; read: a path below the root -> its text, None where there is none."""

    name: str
    read: Callable[[str], str | None]

    def json(self, path: str) -> dict[str, Any]:
        text = self.read(path)
        return json.loads(text) if text else {}

    @property
    def params(self) -> dict[str, Any]:
        """All parameters, flat: {"pretrain.learning_rate": 0.005, ...}."""
        return _flat(YAML(typ="safe", pure=True).load(self.read("params.yaml") or "") or {})

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers of the stages' reports, flat: {"pretrain/loss_last": 4.2, ...}."""
        return stage.flat({name: self.json(f"reports/{name}.json") for name in REPORTS})

    def curve(self, name: str) -> pd.DataFrame:
        """Of `pretrain` or `finetune`, by step; empty where there is none."""
        text = self.read(f"reports/plots/{name}.csv")
        return pd.read_csv(io.StringIO(text), index_col="step") if text else pd.DataFrame()


def state(what: Run | str, params: Params) -> State:
    """The state that a person means; raises `UserError` when there is none."""
    name = what.id if isinstance(what, Run) else str(what)
    if name == live.WORKSPACE or (live.home() / name / "run.json").exists():
        folder = Run(name).folder
        return State(name, lambda path: _text(folder / path))
    revision = repository.git("rev-parse", "--verify", "--quiet", f"{_revision(name, params)}^{{commit}}")
    if not revision:
        raise UserError(
            f"{name!r} is no run, no revision, no experiment and no version of {params.register_.name}; "
            f"`shovel runs` and `shovel experiments` list them."
        )
    return at_revision(name, revision)


def at_revision(name: str, revision: str) -> State:
    """The state that git keeps of a revision."""
    return State(name, lambda path: repository.git("show", f"{revision}:{path}") or None)


def _revision(name: str, params: Params) -> str:
    """What git knows a version of the registry or an experiment by."""
    if name.isdigit() or name in (register.CHAMPION, register.CHALLENGER, register.PREVIOUS):
        tracking.connect()  # a server that is down is no version that is missing
        with suppress(UserError):
            return register.version(params.register_, name).tags.get("git.commit", "")
    experiments = repository.git("for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    return next((reference for reference in experiments if reference.rsplit("/", 1)[-1] == name), name)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


class Comparison:
    """Two states side by side.

    Attributes:
        params: parameters that differ, one row each.
        metrics: figures that differ, with the relative change of the second over the first.
        data: the sources of both, with documents and bytes.
        curves: losses by step; columns (stage, state).
    """

    def __init__(self, first: State, second: State) -> None:
        self.names = (first.name, second.name)
        self.params = _beside(first.params, second.params, self.names)
        self.metrics = _with_change(_beside(first.metrics, second.metrics, self.names))
        self.data = _beside(_profile(first), _profile(second), self.names, differing=False)
        self.curves = _curves(first, second)

    def __repr__(self) -> str:
        parts = {"params": self.params, "metrics": self.metrics, "data": self.data}
        texts = [title + "\n" + table.to_string(**SHOWN) for title, table in parts.items() if len(table)]
        return "\n\n".join(texts) or f"{self.names[0]} and {self.names[1]} are alike"

    def _repr_html_(self) -> str:
        parts = {"Parameters": self.params, "Figures": self.metrics, "Data": self.data}
        tables = [f"<h4>{title}</h4>{table.to_html(**SHOWN)}" for title, table in parts.items() if len(table)]
        stages = dict.fromkeys(self.curves.columns.get_level_values(0)) if len(self.curves) else {}
        return "".join([*tables, *(f"<h4>Loss of {name}</h4>{self._picture(name)}" for name in stages)])

    def _picture(self, stage: str) -> str:
        return display.picture({name: losses.dropna().to_dict() for name, losses in self.curves[stage].items()})


def _beside(
    first: dict[str, Any], second: dict[str, Any], names: tuple[str, str], differing: bool = True
) -> pd.DataFrame:
    keys = [key for key in dict.fromkeys([*first, *second]) if not differing or first.get(key) != second.get(key)]
    rows = [[first.get(key), second.get(key)] for key in keys]
    return pd.DataFrame(rows, index=keys, columns=list(names), dtype=object)


def _with_change(table: pd.DataFrame) -> pd.DataFrame:
    first, second = (table.iloc[:, n].astype(float) for n in range(2))
    return table.assign(change=(second - first) / first.abs().where(first != 0))


def _profile(of: State) -> dict[str, Any]:
    """Documents and bytes by source, as clean counted them."""
    return _flat(of.json("reports/clean.json"))


def _curves(first: State, second: State) -> pd.DataFrame:
    columns = {}
    for name in CURVES:
        for one in (first, second):
            curve = one.curve(name)
            if "loss" in curve:
                columns[name, one.name] = curve["loss"]
    return pd.DataFrame(columns)
