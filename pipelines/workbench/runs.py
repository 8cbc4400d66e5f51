"""A run as an object: what it tries, how far it is, its figures and curves, wherever and by whom it was started."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipelines import live, repository, stage
from pipelines.params import UserError
from pipelines.workbench import overrides

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """One run: of stages in a folder of their own, with overrides; or `workspace`, whatever runs in the repository.

    Attributes:
        id: its name, which `project.attach` takes.
        folder: where its params.yaml, its reports and its models are.
        stages: the stages that it runs, in order, as DVC names them.
        overrides: what differs from params.yaml, by section.
    """

    def __init__(self, run_id: str) -> None:
        """Raises `UserError` when there is no such run."""
        self.id = run_id
        self.home = live.home() / run_id
        self.folder = repository.root() if run_id == live.WORKSPACE else self.home
        if run_id != live.WORKSPACE and (self.home.resolve().parent != live.home().resolve() or not self.home.is_dir()):
            known = ", ".join(run.id for run in every()) or "none"
            raise UserError(f"no run is called {run_id!r}; there are: {known}.")

    @cached_property
    def _card(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return json.loads((self.home / "run.json").read_text(encoding="utf-8"))
        return {}

    @property
    def stages(self) -> list[str]:
        return self._card.get("stages", [])

    @property
    def overrides(self) -> overrides.Overrides:
        return self._card.get("overrides", {})

    @property
    def inputs(self) -> dict[str, str]:
        """md5 of what its stages read and no stage of it made, when it was prepared."""
        return self._card.get("inputs", {})

    @property
    def created(self) -> float:
        """Seconds since 1970."""
        return self._card.get("created", 0.0)

    @property
    def progress(self) -> live.Snapshot | None:
        """How far the stage is that runs, or ran last."""
        since = self.created if self._runner else 0.0
        found = [one for one in live.snapshots(self.id) if one.updated >= since - 1]
        return found[-1] if found else None

    @property
    def _runner(self) -> live.Snapshot | None:
        """The process that executes the stages; None where somebody else does, as `dvc repro` in a terminal."""
        runner, stages = live.read(self.home / "run.jsonl"), live.snapshots(self.id)
        later = runner and stages and not runner.running and stages[-1].updated > runner.updated + 1
        return None if later else runner

    @property
    def status(self) -> str:
        """created, starting, running, waiting, finished, failed, interrupted or killed."""
        runner, last = self._runner, self.progress
        if runner and not (runner.running and last and last.status == live.WAITING):
            return runner.status
        return last.status if last else "created"

    @property
    def seconds(self) -> float:
        """Of all its stages, until now or its end."""
        clock = self._runner or self.progress
        return clock.seconds if clock else 0.0

    @property
    def running(self) -> bool:
        return self.status in (live.STARTING, live.RUNNING, live.WAITING)

    @property
    def succeeded(self) -> bool:
        return self.status == live.FINISHED

    def as_dict(self) -> dict[str, Any]:
        """How far it is, for scripts; the keys stay."""
        last = self.progress
        content = {"id": self.id, "status": self.status, "message": self.message, "overrides": self.overrides}
        if last:
            content |= {"stage": last.label, "done": last.done, "total": last.total, "seconds": last.seconds}
            content |= {"seconds_left": last.seconds_left if last.running else None, "latest": last.points[-1:]}
        return content

    @property
    def message(self) -> str:
        """Why it failed, or whom it waits for."""
        runner, last = self._runner, self.progress
        if runner and runner.status == live.FAILED and not last and self.log.strip():
            return f"{runner.message}: {self.log.strip().splitlines()[-1]}"
        return (runner.message if runner and not runner.running else last.message if last else "") or ""

    @property
    def log(self) -> str:
        """What its processes said."""
        with suppress(OSError):
            return (self.home / "output.log").read_text(encoding="utf-8", errors="replace")
        return ""

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        """The metrics of each stage that it finished, by label (`evaluate-chat`), as in reports/."""
        labels = [name.replace("@", "-") for name in self.stages]
        files = [self.folder / "reports" / f"{label}.json" for label in labels]
        if self.id == live.WORKSPACE:
            files = sorted((self.folder / "reports").glob("*.json"))
        return {file.stem: stage.read_json(file, made_by=file.stem) for file in files if file.exists()}

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers of `reports`, flat: {"pretrain/loss_last": 4.2, ...}."""
        return stage.flat(self.reports)

    @property
    def params(self) -> dict[str, Any]:
        """Its whole params.yaml, overrides included, by section."""
        from pipelines.params import read_yaml

        return read_yaml(self.folder / "params.yaml")

    @property
    def curve(self) -> pd.DataFrame:
        """Loss and speed of the training stage that ran last, one row a step; while it runs, as far as it is."""
        import pandas as pd

        for last in reversed(live.snapshots(self.id)):
            if points := [point for point in last.points if "step" in point]:
                return pd.DataFrame(points).set_index("step").drop(columns=["at", "done", "replayed"])
        return pd.DataFrame()

    @property
    def mlflow_ids(self) -> dict[str, str]:
        """The MLflow run of each stage that it finished, by label."""
        labels = [name.replace("@", "-") for name in self.stages]
        files = [self.folder / "reports" / "runs" / f"{label}.json" for label in labels]
        return {file.stem: stage.read_json(file, made_by=file.stem)["run_id"] for file in files if file.exists()}

    def wait(self, timeout_s: float | None = None) -> Run:
        """Return when it has ended, or after `timeout_s` seconds."""
        until = time.monotonic() + (timeout_s or float("inf"))
        while (self.running or self.status == "created") and time.monotonic() < until:
            time.sleep(0.2)
        return self

    def stop(self) -> Run:
        """End it gently: checkpoints stay, and the next run of the same thing continues from the last one."""
        from pipelines.workbench import trials

        while self.status == live.STARTING:
            time.sleep(0.1)
        runner, last = self._runner, self.progress
        if runner and runner.running:
            trials.stop(runner.process)
        elif last and last.running:
            trials.interrupt(last.process)
        return self.wait(60)

    def remove(self) -> None:
        """Delete its folder, models and all; what was kept stays."""
        from pipelines.workbench import trials

        if self.running or self.id == live.WORKSPACE:
            raise UserError(f"{self.id} {'still runs; stop it first' if self.running else 'is the repository itself'}.")
        if not (self.home / "run.json").exists():
            raise UserError(f"{self.id} is no run of `shovel runs`; only those are removed.")
        trials.remove(self.id)

    def __repr__(self) -> str:
        what = overrides.in_words(self.overrides) or "params.yaml as it is"
        told = f": {self.message}" if self.message and self.status != live.FINISHED else ""
        return f"<run {self.id}: {', '.join(self.stages) or 'dvc repro'} with {what}; {self.status}{told}>"

    def _repr_html_(self) -> str:
        from pipelines.workbench import display

        return display.html(self)


def every() -> list[Run]:
    """All runs with a folder of their own, the newest first."""
    found = [Run(file.parent.name) for file in live.home().glob("*/run.json") if file.parent.name != live.WORKSPACE]
    return sorted(found, key=lambda run: run.created, reverse=True)
