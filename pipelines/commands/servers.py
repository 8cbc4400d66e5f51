"""Commands that serve: the MLflow UI, and a registered model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands import PARAMS

if TYPE_CHECKING:
    from pipelines.deploy import Model, Target
    from pipelines.engines import Command

Name = Annotated[str | None, typer.Argument(help="models:/NAME@alias; the champion of this repository without one")]
Port = Annotated[int | None, typer.Option(help="params.yaml's when none is named")]
Host = Annotated[str, typer.Option(help="0.0.0.0 for other machines: then .serve/callers must name who may ask")]
Kind = Annotated[str, typer.Option("--engine", help="builtin, transformers, or vllm (writes what starts it)")]


def ui(port: int = 5000) -> None:
    """The MLflow server on 127.0.0.1, one worker; prints the address of the training view."""
    from pipelines.endpoint import require_port
    from pipelines.tracking import ui_address, ui_command

    require_port("127.0.0.1", port)
    command, environment = ui_command(port)
    typer.echo(f"open {ui_address(port)}  (Ctrl-C ends it)")
    os.execvpe(command[0], command, environment)


def serve(model: Name = None, port: Port = None, host: Host = "127.0.0.1", engine: Kind = "builtin") -> None:
    """Serve a model in the foreground and follow its alias; Ctrl-C ends it."""
    from pipelines import endpoint

    where, port = _where(model, port)
    endpoint.require_free(host, port)
    command, environment = _command(where, host, port, engine)
    endpoint.claim(where, engine, host, port)
    typer.echo(_invitation(f"http://{host}:{port}"))
    os.execvpe(command[0], command, environment)


def deploy(
    model: Name = None,
    port: Port = None,
    host: Host = "127.0.0.1",
    engine: Kind = "builtin",
    stop: Annotated[bool, typer.Option("--stop", help="end the server; it finishes its answers")] = False,
    status: Annotated[bool, typer.Option("--status", help="which version answers where; 1 when none does")] = False,
) -> None:
    """Serve a model in the background: checked, started, tried; from then on the server follows the alias."""

    if stop or status:
        raise typer.Exit(_stop() if stop else _status())
    where, port = _where(model, port)
    if engine == "vllm":
        _write_vllm(where, host, port)
    else:
        _start(where, host, port, engine)


def _start(where: Target, host: str, port: int, engine: str) -> None:
    from pipelines import endpoint

    endpoint.require_free(host, port)
    command, environment = _command(where, host, port, engine)
    process = endpoint.start(command, environment)
    endpoint.claim(where, engine, host, port, process.pid)
    address = f"http://{host}:{port}"
    endpoint.await_ready(process, address)
    version = (endpoint.health(address) or {}).get("version", "?")
    typer.echo(f"{where} version {version} answers; {endpoint.LOG} is its log, `shovel deploy --stop` ends it")
    typer.echo(_invitation(address))


def _where(model: str | None, port: int | None) -> tuple[Target, int]:
    """(what to serve, on which port)"""
    from pipelines.deploy import target
    from pipelines.params import load_params

    params = load_params(PARAMS)
    return target(model, params.register_.name), port or params.serve.port


def _command(where: Target, host: str, port: int, engine: str) -> Command:
    """(words, environment) of the process that serves; one that does not check its model itself gets it checked."""
    from pipelines.engines import ENGINES
    from pipelines.params import UserError

    if engine not in ENGINES:
        raise UserError(
            f"no engine is called {engine!r}; choose builtin or transformers, or let `deploy` write vllm's."
        )
    chosen = ENGINES[engine]
    return chosen.command(where, None if chosen.follows else _prepare(where), host, port)


def _prepare(where: Target) -> Model:
    from pipelines import deploy, tracking
    from pipelines.params import load_params

    return deploy.prepare(tracking.connect(), where, load_params(PARAMS))


def _write_vllm(where: Target, host: str, port: int) -> None:
    from pipelines.engines import vllm_command, write_vllm

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
    from pipelines import endpoint

    state = endpoint.stop()
    typer.echo(
        f"{state['model']} at {state['address']} has ended" if state else "nothing is served from this repository"
    )
    return 0


def _status() -> int:
    from pipelines import endpoint

    state = endpoint.running()
    found = endpoint.health(state["address"]) if state else None
    if state is None or found is None:
        typer.echo("nothing is served from this repository" if state is None else f"{state['address']} does not answer")
        return 1
    typer.echo(f"{state['model']} version {found.get('version', '?')} at {state['address']} ({state['engine']})")
    follows = found.get("follows") or {}
    if refused := follows.get("refused"):
        typer.echo(f"version {refused['version']} was refused: {refused['why']}")
    if follows.get("registry_silent_s") is not None:
        typer.echo(f"the registry has not answered for {follows['registry_silent_s']} s; serving goes on")
    return 0


def _invitation(address: str) -> str:
    body = '{"messages": [{"role": "user", "content": "What is AI?"}]}'
    return (
        f"serving at {address}/v1; ask in another terminal:\n"
        f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
