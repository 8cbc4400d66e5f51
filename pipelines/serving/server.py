"""The endpoint in the foreground: uvicorn around the application, until Ctrl-C or SIGTERM; answers are finished."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from pipelines import stage
from pipelines.params import Serve, UserError
from pipelines.serving.app import create_app
from pipelines.serving.guard import read_callers
from pipelines.serving.ledger import LEDGER, Ledger
from pipelines.serving.manager import Manager

KEEP_ALIVE_S, LAST_ANSWERS_S = 75, 30
BACKLOG = 2048


def run(manager: Manager, params: Serve, host: str, port: int, callers: Mapping[str, str] | None = None) -> None:
    """Serve what `manager` holds on host and port until a signal; closes the manager. Raises `UserError`."""
    require_callers(host, callers)
    ledger = Ledger(LEDGER, params)
    app = create_app(manager, params, ledger, callers)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    try:
        uvicorn.Server(config).run()
    finally:
        manager.close()
        ledger.close()


def callers_of(host: str, port: int, tokens: Path | None) -> dict[str, str] | None:
    """Who may ask there: bearer token -> name, or None for everybody on this machine. Raises `UserError` at once where
    the address is taken, or could be reached by others without a token."""
    callers = read_callers(tokens) if tokens else None
    require_callers(host, callers)
    require_free(port, host)
    return callers


def require_free(port: int, host: str = "127.0.0.1") -> None:
    """Raises `UserError` where something listens already, or nobody can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"port {port} cannot be used on {host} ({why}); name another with --port.") from None


def require_callers(host: str, callers: Mapping[str, str] | None) -> None:
    """Raises `UserError` when others than this machine could ask without a token."""
    if callers is None and not _is_loopback(host):
        raise UserError(f"{host} can be reached from elsewhere; name a file of bearer tokens with --tokens.")


def announce(name: str, version: str, host: str, port: int, with_token: bool) -> None:
    """How to ask, in two lines."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is AI?"}]})
    header = " -H 'Authorization: Bearer TOKEN'" if with_token else ""
    stage.say(
        f"serve      {name} version {version} at http://{host}:{port}/v1 (Ctrl-C ends it); ask in another terminal:\n"
        f"  curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'"
    )


def foreground(
    folder: Path,
    name: str,
    version: str,
    params: Serve,
    host: str,
    port: int,
    callers: Mapping[str, str] | None,
) -> None:
    """Load an exported folder and serve it until a signal. Raises `UserError`."""
    manager = Manager(params)
    manager.switch(manager.load(folder, name, version))
    announce(name, version, host, port, callers is not None)
    run(manager, params, host, port, callers)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
