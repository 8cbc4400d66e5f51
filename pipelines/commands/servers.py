"""Commands that serve: the MLflow UI, the champion, and what the champion's endpoint was used for."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands import PARAMS, RELEASE


def ui(port: int = 5000) -> None:
    """The MLflow server on 127.0.0.1, one worker; prints the address of the training view."""
    from pipelines.tracking import ui_address, ui_command

    _require_free(port)
    command, environment = ui_command(port)
    typer.echo(f"open {ui_address(port)}  (Ctrl-C ends it)")
    os.execvpe(command[0], command, environment)


class EngineName(StrEnum):
    builtin = "builtin"
    transformers = "transformers"


def serve(
    engine: Annotated[EngineName, typer.Option(help="transformers: its own server, one request at a time")] = (
        EngineName.builtin
    ),
    host: Annotated[str, typer.Option(help="other than this machine's own needs --tokens")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="of params.yaml when none is named")] = None,
    tokens: Annotated[Path | None, typer.Option(help="file with a line NAME TOKEN for each caller, mode 0600")] = None,
) -> None:
    """The champion behind an OpenAI-compatible endpoint, on this machine alone unless told otherwise."""
    from pipelines.params import load_params
    from pipelines.register import champion_folder, status

    params = load_params(PARAMS)
    port = port or params.serve.port
    if engine is EngineName.transformers:
        _require_free(port)
        _transformers(champion_folder(params.register_, RELEASE), port)
    from pipelines.serving import server

    callers = server.callers_of(host, port, tokens)
    folder = champion_folder(params.register_, RELEASE)
    version = str(status(params.register_)["champion"]["version"])
    server.foreground(folder, params.register_.name, version, params.serve, host, port, callers)


def usage(
    since: Annotated[str, typer.Option(help="a day or a time, as 2026-01-31 or 2026-01-31T12:00:00Z")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Tokens that callers of the endpoint used, and what they cost."""
    from rich.console import Console
    from rich.table import Table

    from pipelines.serving.ledger import LEDGER, totals

    rows = totals(LEDGER, since)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("nothing was asked yet; `shovel serve` starts the endpoint")
        return
    table = Table(*(name for name in rows[0] if name != "currency"), box=None)
    for row in rows:
        cells = {**row, "cost": f"{row['cost']:.6f} {row.pop('currency')}"}
        cells.pop("currency")
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells.values()))
    Console().print(table)


def _transformers(folder: Path, port: int) -> None:
    """The server of transformers in place of this process, on 127.0.0.1."""
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    typer.echo(f"serving {folder} at http://127.0.0.1:{port}/v1 with transformers (Ctrl-C ends it)")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    os.execvpe(command[0], [*command, "--host", "127.0.0.1", "--port", str(port)], environment)


def _require_free(port: int) -> None:
    import socket

    from pipelines.params import UserError

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} is in use on 127.0.0.1; name another with --port.")
