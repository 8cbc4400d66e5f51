"""The `shovel` command. Everything heavy is imported inside the commands, so that `shovel --help` is immediate."""

from __future__ import annotations

import os
import sys

import typer

from pipelines.commands import machine, registry, runs, servers, talk, work

COMMANDS = {
    "Work": (work.status, work.run, work.check, work.use, work.link, work.accept, work.demo),
    "Runs": (runs.runs, runs.watch, runs.compare, runs.keep, runs.experiments),
    "Registry": (runs.propose, work.review, registry.promote, registry.rollback, registry.register),
    "Models": (talk.chat, talk.generate),
    "Servers": (servers.ui, servers.serve),
    "Machine": (machine.doctor, machine.audit, machine.passport),
}
EXITS = (
    "Exit codes: 0 done; 1 an examination found something wrong (doctor, audit, passport); 2 a mistake that the "
    "sentence on the terminal tells how to mend; 130 interrupted."
)
HELP = "Raw text to a reviewed mixture-of-experts model. Start with `shovel status`: it says what to do next."
app = typer.Typer(no_args_is_help=True, help=HELP, epilog=EXITS)
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


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
