"""The project from a notebook: try, watch, compare, keep, propose, review, each in one line.

    from pipelines import project

    project.stages()                                       what is fresh, what is stale and why
    run = project.run("pretrain", learning_rate=3e-3)      params.yaml stays as it is
    project.compare("workspace", run)                      parameters, figures, data, curves
    project.keep(run)                                      now params.yaml has it, and `dvc repro` has nothing to do
    project.model("champion").chat("What is AI?")

The same words are commands: `shovel status`, `shovel run`, `shovel compare`, ... Mistakes raise `UserError`, whose one
sentence says what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import repository as _repository
from pipelines.params import UserError
from pipelines.workbench import kernel as _kernel
from pipelines.workbench.runs import Run

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.workbench.assistant import Model
    from pipelines.workbench.comparison import Comparison
    from pipelines.workbench.keeping import Kept
    from pipelines.workbench.proposal import Review, Version

__all__ = [
    "Run",
    "UserError",
    "attach",
    "compare",
    "experiments",
    "keep",
    "model",
    "promote",
    "propose",
    "review",
    "rollback",
    "run",
    "runs",
    "stages",
    "watch",
]
_repository.enter()
_kernel.check()


def stages() -> pd.DataFrame:
    """All stages of dvc.yaml with their state, one row each, in the order in which they run.

    Columns: state (fresh, stale, running, waiting, failed, interrupted or killed) and why.

    >>> project.stages()
    >>> project.stages().query("state != 'fresh'")
    """
    import pandas as pd

    from pipelines.workbench.graph import states

    rows = {stage.name: {"state": stage.state, "why": stage.why} for stage in states().values()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")


def run(stage: str, upto: bool = False, *, wait: bool = True, **overrides: Any) -> Run:
    """Run one stage, in a process of its own, and show how far it is.

    Without overrides it runs in the repository, as `dvc repro` does. With overrides it runs in a folder of its own in
    .runs, and neither params.yaml nor data/ change until `keep`. Interrupting the cell ends it gently: the last
    checkpoint stays, and the next run of the same thing continues from it. A kernel that dies ends nothing; `attach`
    finds the run again.

    Args:
        stage: its name, as `stages` has it: "pretrain", "evaluate@chat", or "evaluate" for both.
        upto: run what comes before it as well, as far as it is stale or an override changes it.
        wait: False returns at once; `watch` shows it later.
        overrides: keys of the stage's section of params.yaml; another stage's section by name, as a dict.

    Raises:
        UserError: no such stage or key, an impossible value, or missing inputs; the sentence names the stage that
            makes them.

    >>> run = project.run("pretrain", learning_rate=3e-3, steps=200)
    >>> project.run("pretrain", model={"num_hidden_layers": 3})
    >>> project.run("evaluate@chat", upto=True, finetune={"learning_rate": 1e-3})
    >>> project.run("review", upto=True)
    """
    _kernel.check()
    from pipelines.workbench import running

    return running.run(stage, upto, overrides, wait)


def runs() -> pd.DataFrame:
    """All runs with overrides, the newest first: status, stages, overrides, when, and the last loss of each.

    >>> project.runs()
    """
    from pipelines.workbench import running

    return running.table()


def attach(run: Run | str = "workspace") -> Run:
    """A run by its id, wherever it was started; "workspace" is what `dvc repro` or `shovel run` do here.

    >>> run = project.attach("pretrain-1124-235501")
    >>> run.status, run.metrics, run.curve, run.log
    """
    if not isinstance(run, Run | str) or run == "":
        raise UserError(f"{run!r} is no run; name one of `shovel runs` by its id.")
    return run if isinstance(run, Run) else Run(run)


def watch(run: Run | str | None = None) -> Run:
    """Show a run until it ends: bar, loss so far, tokens a second, time left. Interrupting ends only the watching.

    run: a run or its id; whatever runs now, when none is named.

    >>> project.watch()
    """
    from pipelines.workbench import running

    return running.look(attach(run) if run else running.current())


def keep(run: Run | str) -> Kept:
    """Write a run's overrides into params.yaml and put its outputs in place, so that `dvc repro` need not train again.

    Comments of params.yaml stay. Where data, code or params.yaml changed since the run began, the answer says which
    stages `dvc repro` has to run again, and why.

    >>> project.keep(run)
    """
    _kernel.check()
    from pipelines.workbench import keeping

    return keeping.keep(attach(run))


def experiments() -> pd.DataFrame:
    """DVC's experiments and the runs in MLflow in one table, the newest first; one row an experiment, run or pipeline.

    >>> project.experiments().sort_values("evaluate-chat/bits_per_byte")
    """
    _kernel.check()
    from pipelines.workbench import experiments as table

    return table.table()


def compare(a: Run | str, b: Run | str = "workspace") -> Comparison:
    """Two states side by side: `.params` and `.metrics` that differ, `.data` by source, `.curves`.

    A state is a run or its id, "workspace", a git revision, a DVC experiment, or a version of the registry by number or
    alias.

    >>> project.compare("workspace", run)
    >>> project.compare("champion", "challenger").metrics
    >>> project.compare("HEAD~1", run).curves["pretrain"].plot()
    """
    _kernel.check()
    from pipelines.params import load_params
    from pipelines.workbench import comparison

    params = load_params()
    return comparison.Comparison(*(comparison.state(one, params) for one in (a, b)))


def model(which: Run | str | int | Path = "champion") -> Model:
    """A model to talk to: `.generate(text)`, `.chat(question)`, `.score(texts)`, `.experts(text)`.

    which: "champion", "challenger", "previous" or a number of the registry; "base", "chat" or "release" of the
    repository; a run; a folder.

    >>> project.model("champion").chat("What is AI?")
    >>> project.model(run).score(["def f(x):", "To be, or not to be"])
    """
    _kernel.check()
    from pipelines.workbench import choosing

    return choosing.model(which)


def propose(run: Run | str | None = None) -> Version:
    """Make the release of the repository a version in the registry, as challenger.

    run: has to be what the repository holds (see `keep`); nothing is asked when none is named.

    >>> project.propose(run)
    """
    _kernel.check()
    from pipelines.params import load_params
    from pipelines.workbench import proposal

    return proposal.propose(load_params(), attach(run) if run else None)


def review(version: int | str | None = None) -> Review:
    """What a person decides on: `.gates`, one row a condition, and `.page`, the review page.

    version: a number or an alias; the challenger, else the champion, when none is named.

    >>> project.review()
    """
    _kernel.check()
    from pipelines.params import load_params
    from pipelines.workbench import proposal

    return proposal.review(load_params(), version)


def promote(version: int | None = None, comment: str = "") -> Version:
    """Make a version the champion when every gate holds; the challenger, when none is named. comment: why.

    Raises `UserError` that names every gate which does not hold; nothing is moved then.
    """
    _kernel.check()
    from pipelines import register
    from pipelines.params import load_params
    from pipelines.workbench import proposal

    params = load_params()
    record = register.promote(params, proposal.RELEASE, proposal.REPORTS, version, comment)
    return proposal.version(params, record["version"])


def rollback(comment: str = "") -> Version:
    """Make the previous champion the champion again. comment: why, for the release record."""
    from pipelines import register
    from pipelines.params import load_params
    from pipelines.workbench import proposal

    params = load_params()
    record = register.rollback(params.register_, proposal.REPORTS, comment)
    return proposal.version(params, record["version"])
