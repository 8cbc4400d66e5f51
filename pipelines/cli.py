"""The `shovel` command. Everything heavy is imported inside the commands, so that `shovel --help` is immediate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from pipelines.commands import machine, registry, runs, servers, talk, trust, work

COMMANDS = {
    "Work": (work.status, work.run, work.check, work.use, work.link, work.accept, work.demo),
    "Runs": (runs.runs, runs.watch, runs.compare, runs.keep, runs.experiments),
    "Registry": (runs.propose, registry.promote, registry.rollback, registry.register),
    "Trust": (trust.review, trust.why, trust.verify, trust.keys),
    "Models": (talk.chat, talk.generate),
    "Servers": (servers.ui, servers.serve, servers.deploy, servers.usage),
    "Machine": (machine.doctor, machine.audit, machine.passport),
}
EXITS = (
    "Exit codes: 0 done; 1 an examination found something wrong (doctor, audit, passport, verify); 2 a mistake that "
    "the sentence on the terminal tells how to mend; 130 interrupted."
)
HELP = "Raw text to a reviewed mixture-of-experts model. Start with `shovel status`: it says what to do next."
ANYWHERE = "Machine"  # commands of this theme need no project


class InProject(TyperCommand):
    """A command that needs the project around it; its help does not."""

    def invoke(self, ctx: Any) -> Any:
        """Raises `UserError` outside of a project."""
        if not Path("dvc.yaml").exists():
            from pipelines.params import UserError

            raise UserError("there is no dvc.yaml here; run from a folder of the repository.")
        return super().invoke(ctx)


app = typer.Typer(no_args_is_help=True, help=HELP, epilog=EXITS)
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel, cls=None if panel == ANYWHERE else InProject)(command)


def main() -> None:
    """Entry point, from any folder of the repository: a person's mistake becomes one sentence and exit code 2."""
    from pipelines.repository import root
    from pipelines.stage import advice

    os.chdir(root())
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        found = advice(error)
        if found is None:
            raise
        print(f"shovel: {found[0]}", file=sys.stderr)
        sys.exit(found[1])


if __name__ == "__main__":
    main()
