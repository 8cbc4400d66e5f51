"""Commands about runs: try, watch, compare, keep, propose. The same words as pipelines/project.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands import complete

if TYPE_CHECKING:
    import pandas as pd

Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]
RunId = Annotated[str, typer.Argument(help="a run of `shovel runs`", autocompletion=complete.runs)]


def try_out(stages: list[str], settings: list[str], keep_it: bool) -> None:
    """A run with overrides, in a folder of its own, followed to its end; kept where that is wanted."""
    from pipelines.params import UserError
    from pipelines.workbench import keeping, running

    if len(stages) > 1:
        raise UserError(
            f"--set takes one stage; name only the last, {stages[-1]}: what comes before it runs as far as it has to, "
            "and `--set STAGE.KEY=VALUE` reaches it."
        )
    typer.echo("status     looking at the stages ...", err=True)
    run = running.run_words(stages[0] if stages else "review", settings)
    if not run.succeeded:
        raise typer.Exit(130)
    typer.echo(f"{run.id} made {', '.join(run.stages)}; see `shovel compare workspace {run.id}`")
    typer.echo(repr(keeping.keep(run)) if keep_it else f"`shovel keep {run.id}` writes its overrides into params.yaml")


def runs(
    as_json: Json = False,
    remove: Annotated[str | None, typer.Option(help="delete this run's folder", autocompletion=complete.runs)] = None,
) -> None:
    """List the runs with overrides, the newest first.

    Example: shovel runs --remove pretrain-1125-001846
    """
    from pipelines.workbench import running
    from pipelines.workbench.runs import Run

    if remove:
        Run(remove).remove()
        typer.echo(f"{remove} is gone")
        return
    _print(running.table(), as_json, "there are no runs yet; `shovel run pretrain --set learning_rate=3e-3` makes one")


def watch(
    run: Annotated[
        str | None, typer.Argument(help="a run, or `workspace`; what runs now if none", autocompletion=complete.runs)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what runs, whoever started it, until it ends: bar, loss, speed, time left. Ctrl-C ends the watching.

    With --json: how far it is now, once.

    Example: shovel watch
    """
    from pipelines.workbench import running
    from pipelines.workbench.runs import Run

    found = Run(run) if run else running.current()
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    running.look(found)


def keep(run: RunId) -> None:
    """Write a run's overrides into params.yaml and put its results in place: `dvc repro` need not train again.

    Example: shovel keep pretrain-1125-001846
    """
    from pipelines.workbench.keeping import keep as keep_run
    from pipelines.workbench.runs import Run

    typer.echo(repr(keep_run(Run(run))))


def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="a run, `workspace`, a revision, an experiment, a version or its alias", autocompletion=complete.states
        ),
    ],
    b: Annotated[str, typer.Argument(help="the other one", autocompletion=complete.states)] = "workspace",
    as_json: Json = False,
) -> None:
    """Two states side by side: parameters and figures that differ, and the data.

    Examples: shovel compare champion challenger; shovel compare HEAD~1 workspace --json
    """
    from pipelines import project

    found = project.compare(a, b)
    if as_json:
        tables = {"params": found.params, "metrics": found.metrics, "data": found.data}
        typer.echo(json.dumps({name: _rows(table, "index") for name, table in tables.items()}))
        return
    typer.echo(repr(found))


def experiments(as_json: Json = False) -> None:
    """DVC's experiments and MLflow's runs in one table, the newest first.

    Example: shovel experiments --json
    """
    from pipelines import project

    _print(project.experiments(), as_json, "there are no experiments yet; `shovel run` makes the first run")


def propose(
    run: Annotated[str | None, typer.Argument(help="a run that was kept", autocompletion=complete.runs)] = None,
    as_json: Json = False,
) -> None:
    """Make the release a version in the registry, as challenger; the same bytes never become two versions.

    Example: shovel propose
    """
    from dataclasses import asdict

    from pipelines import project

    version = project.propose(run)
    typer.echo(json.dumps(asdict(version)) if as_json else repr(version))


def _print(table: pd.DataFrame, as_json: bool, empty: str) -> None:
    if as_json:
        typer.echo(json.dumps(_rows(table.reset_index(), "records")))
    elif table.empty:
        typer.echo(empty)
    else:
        shown = table.dropna(axis="columns", how="all").to_string(na_rep="", float_format=lambda value: f"{value:.4g}")
        typer.echo("\n".join(line.rstrip() for line in shown.splitlines()))


def _rows(table: pd.DataFrame, orient: str) -> Any:
    """Plain values, missing ones as null."""
    return json.loads(table.to_json(orient=orient, date_format="iso"))
