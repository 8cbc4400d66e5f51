"""Execute a notebook from top to bottom and keep what it showed, as a page and as a notebook with outputs.

    python -m pipelines.notebooks.execute 03_architecture     notebooks/*.py -> notebooks/pages/*.html, *.ipynb

papermill runs it in this environment at the repository's root; page and notebook go to MLflow too. notebooks/dvc.yaml
holds one stage a notebook: `make notebooks` runs those whose inputs changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import stage, tracking
from pipelines.params import UserError

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS, EXECUTED = Path("notebooks"), Path("notebooks/pages")
OF_DVC = "DVC_"  # variables of the running stage: a notebook starts stages of its own
QUIET = ["--IPKernelApp.log_level=40"]  # the kernel need not say that it listens on 127.0.0.1
OFFLINE = {"mathjax_url": "", "require_js_url": "", "jquery_url": "", "mermaid_js_url": ""}  # nothing from a network


def execute(source: Path, folder: Path, run: tracking.Run | None = None) -> dict[str, float]:
    """Run the notebook `source` (py:percent); writes `folder`/<name>.html and .ipynb.

    Returns how many cells ran. Raises `UserError` when the packages of the extra `lab` are missing, or with the cell
    and the sentence of its error; the notebook as far as it came is kept all the same.
    """
    if not source.exists():
        known = ", ".join(sorted(path.stem for path in source.parent.glob("[0-9]*.py")))
        raise UserError(f"no notebook is called {source.stem}; choose one of {known}.")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}.ipynb"
    try:
        _run(source, target)
        notebook = write_page(target, target.with_suffix(".html"))
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; `make lab` installs what notebooks need.") from None
    for file in (target.with_suffix(".html"), target) if run else ():
        run.artifact(file)
    return {"cells": sum(cell.cell_type == "code" for cell in notebook.cells)}


def _run(source: Path, target: Path) -> None:
    """papermill on the notebook that jupytext makes of the Python file."""
    import jupytext
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    options = {"kernel_name": "python3", "progress_bar": stage.console.is_terminal, "extra_arguments": QUIET}
    with tempfile.TemporaryDirectory() as temporary, _without_dvc():
        plain = Path(temporary) / target.name
        nbformat.write(jupytext.read(source), plain)
        try:
            papermill.execute_notebook(plain, target, cwd=".", **options)
        except PapermillExecutionError as error:
            what = f"{error.ename}: {error.evalue}".rstrip(".")
            raise UserError(f"{source}, cell {error.cell_index + 1}: {what}; see {target}.") from None


def write_page(executed: Path, page: Path) -> NotebookNode:
    """The executed notebook as one HTML file that needs no network; returns the notebook."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    content, _ = HTMLExporter(embed_images=True, **OFFLINE).from_notebook_node(notebook)
    with stage.replacing(page) as fresh:
        fresh.write_text(content, encoding="utf-8")
    return notebook


@contextmanager
def _without_dvc() -> Iterator[None]:
    """Hides the running stage from the kernel, which inherits this process's environment."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(OF_DVC)}
    yield
    os.environ.update(hidden)


def main(name: str) -> None:
    """One notebook as a stage; its figures are in the run, so that nothing of it is part of a model's lineage."""
    label = f"notebooks-{name}"
    with stage.exits(label), tracking.stage_run(label, None) as run:
        run.log(execute(NOTEBOOKS / f"{name}.py", EXECUTED, run))
        stage.say(f"notebooks  {EXECUTED / name}.html")


if __name__ == "__main__":
    main(sys.argv[1])
