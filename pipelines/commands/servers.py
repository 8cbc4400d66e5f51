"""Commands that serve: the MLflow UI, a registered model behind an endpoint, and what that was used for."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands import PARAMS

if TYPE_CHECKING:
    from pipelines.deployment.deploy import Model, Target
    from pipelines.deployment.engines import Command

WIDE = 1000  # characters of a line that is not for a terminal
Name = Annotated[
    str | None,
    typer.Argument(help="models:/NAME@alias, or an alias of this repository's model; its champion without one"),
]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="params.yaml's when none is named")]
Host = Annotated[str, typer.Option(help="other than this machine's own needs --tokens")]
Tokens = Annotated[Path | None, typer.Option(help="file with a line NAME TOKEN for each caller, mode 0600")]


class EngineName(StrEnum):
    builtin = "builtin"
    transformers = "transformers"
    vllm = "vllm"


Kind = Annotated[
    EngineName,
    typer.Option("--engine", help="transformers: its own server, one request at a time; vllm: is written only"),
]


def ui(port: Annotated[int, typer.Option(min=1, max=65535)] = 5000) -> None:
    """The MLflow server on 127.0.0.1, one worker; prints the address of the training view."""
    from pipelines.deployment.endpoint import require_port
    from pipelines.tracking import ui_address, ui_command

    require_port("127.0.0.1", port)
    command, environment = ui_command(port)
    typer.echo(f"open {ui_address(port)}  (Ctrl-C ends it)")
    os.execvpe(command[0], command, environment)


def serve(
    model: Name = None,
    port: Port = None,
    host: Host = "127.0.0.1",
    engine: Kind = EngineName.builtin,
    tokens: Tokens = None,
) -> None:
    """Serve a model in the foreground and follow its alias; Ctrl-C ends it."""
    from pipelines import tracking
    from pipelines.deployment import endpoint
    from pipelines.deployment.deploy import behind

    where, port = _where(model, port)
    (command, environment, name), checked = _command(where, host, port, engine, tokens)
    behind(tracking.connect(), where)  # before anybody is invited
    endpoint.claim(where, engine, host, port, checked)
    typer.echo(_invitation(name, endpoint.url(host, port), tokens))
    os.execvpe(command[0], command, environment)


def deploy(
    model: Name = None,
    port: Port = None,
    host: Host = "127.0.0.1",
    engine: Kind = EngineName.builtin,
    tokens: Tokens = None,
    stop: Annotated[bool, typer.Option("--stop", help="end the server; it finishes its answers")] = False,
    status: Annotated[bool, typer.Option("--status", help="which version answers where; 1 when none does")] = False,
) -> None:
    """Serve a model in the background: checked, started, tried; from then on the server follows the alias."""
    if stop or status:
        raise typer.Exit(_stop() if stop else _status())
    where, port = _where(model, port)
    if engine is EngineName.vllm:
        _write_vllm(where, host, port)
    else:
        _start(where, host, port, engine, tokens)


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
        typer.echo(f"nothing was asked {f'since {since}' if since else 'yet; `shovel serve` starts the endpoint'}")
        return
    table = Table(*(name for name in rows[0] if name != "currency"), box=None)
    for row in rows:
        cells = {**row, "cost": f"{row['cost']:.6f} {row.pop('currency')}"}
        cells.pop("currency")
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells.values()))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _start(where: Target, host: str, port: int, engine: EngineName, tokens: Path | None) -> None:
    from pipelines import tracking
    from pipelines.deployment import endpoint
    from pipelines.deployment.deploy import tag

    (command, environment, name), model = _command(where, host, port, engine, tokens)
    process = endpoint.start(command, environment)
    state = endpoint.claim(where, engine, host, port, model, process.pid)
    address = state["address"]
    endpoint.await_ready(process, address, name, tokens)
    if model:
        tag(tracking.connect(), model.version, "deployed", address=address, engine=engine)
    typer.echo(
        f"{where} version {endpoint.version(state)} answers; {endpoint.LOG} is its log, `shovel deploy --stop` ends it"
    )
    typer.echo(_invitation(name, address, tokens))


def _where(model: str | None, port: int | None) -> tuple[Target, int]:
    """(what to serve, on which port)"""
    from pipelines.deployment.deploy import target
    from pipelines.params import load_params

    params = load_params(PARAMS)
    return target(model, params.register_.name), port or params.serve.port


def _command(
    where: Target, host: str, port: int, engine: EngineName, tokens: Path | None
) -> tuple[Command, Model | None]:
    """What starts the process that serves, where it can; and the checked model of an engine that checks none itself."""
    from pipelines.deployment.endpoint import require_free
    from pipelines.deployment.engines import ENGINES
    from pipelines.params import UserError
    from pipelines.serving.server import callers_of

    if engine not in ENGINES:
        raise UserError(f"{engine} is not started here; `shovel deploy --engine {engine}` writes what starts it.")
    callers_of(host, tokens)
    require_free(host, port)
    model = None if ENGINES[engine].follows else _prepare(where)
    return ENGINES[engine].command(where, model, host, port, tokens), model


def _prepare(where: Target) -> Model:
    from pipelines import tracking
    from pipelines.deployment import deploy
    from pipelines.params import load_params

    return deploy.prepare(tracking.connect(), where, load_params(PARAMS))


def _write_vllm(where: Target, host: str, port: int) -> None:
    from pipelines.deployment.engines import vllm_command, write_vllm

    model = _prepare(where)
    file, versions = write_vllm(where, model, host, port)
    typer.echo(
        f"vLLM {versions['vllm']} with vllm-ascend {versions['vllm_ascend']}, torch-npu {versions['torch_npu']} and"
    )
    typer.echo(f"CANN {versions['cann']} belong together. Nothing was started; on the machine with the NPUs:")
    typer.echo(f"  docker compose -f {file} up -d")
    typer.echo(f"or, in an installation of these versions, with {model.folder} for /model:")
    typer.echo(f"  {' '.join(vllm_command(where, model, port))}")


def _stop() -> int:
    from pipelines.deployment import endpoint

    state = endpoint.stop()
    typer.echo(
        f"{state['model']} at {state['address']} has ended" if state else "nothing is served from this repository"
    )
    return 0


def _status() -> int:
    from pipelines.deployment import endpoint

    state = endpoint.running()
    found = endpoint.health(state["address"]) if state else None
    if state is None or found is None:
        typer.echo("nothing is served from this repository" if state is None else f"{state['address']} does not answer")
        return 1
    if found.get("status") == "loading":
        typer.echo(f"{state['model']} is being loaded; {state['address']} answers once it is")
        return 1
    typer.echo(f"{state['model']} version {endpoint.version(state)} at {state['address']} ({state['engine']})")
    follows = found.get("follows") or {}
    if refused := follows.get("refused"):
        typer.echo(f"version {refused['version']} was refused: {refused['why']}")
    if follows.get("registry_silent_s") is not None:
        typer.echo(f"the registry has not answered for {follows['registry_silent_s']} s; serving goes on")
    return 0


def _invitation(name: str, address: str, tokens: Path | None) -> str:
    """How to ask, in two lines."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is AI?"}]})
    header = " -H 'Authorization: Bearer TOKEN'" if tokens else ""
    return (
        f"serving at {address}/v1; ask in another terminal:\n"
        f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'"
    )
