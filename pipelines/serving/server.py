"""The endpoint in the foreground: uvicorn around the application, until Ctrl-C or SIGTERM; answers are finished."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from pipelines import stage
from pipelines.params import Serve, UserError
from pipelines.serving.app import create_app
from pipelines.serving.guard import read_callers
from pipelines.serving.ledger import LEDGER, Ledger
from pipelines.serving.manager import Manager

KEEP_ALIVE_S, LAST_ANSWERS_S = 75, 30
BACKLOG = 2048


def run(
    manager: Manager,
    params: Serve,
    host: str,
    port: int,
    callers: Mapping[str, str] | None = None,
    usage: Path = LEDGER,
    more: Callable[[], dict[str, Any]] = dict,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Serve what `manager` holds on host and port until a signal; closes the manager. Raises `UserError`.

    usage: the ledger's file. more: what /health says besides. begin: brings a model while the port is open already.
    """
    require_callers(host, callers)
    ledger = Ledger(usage, params)
    app = create_app(manager, params, ledger, callers, more)
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
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_listen, args=(server,), name="http", daemon=True)
    thread.start()  # while this thread, which signals reach, loads and waits
    try:
        with suppress(KeyboardInterrupt):
            while thread.is_alive() and not server.started:
                time.sleep(0.01)
            if server.started:
                begin()
            thread.join()
            raise UserError(f"the server on {host}, port {port}, ended of itself; the reason stands above.")
    finally:
        _end(server, thread)
        manager.close()
        ledger.close()
    stage.say("serve      the server has ended")


def _listen(server: uvicorn.Server) -> None:
    with suppress(SystemExit):  # where it cannot: it has said why
        server.run()


def _end(server: uvicorn.Server, thread: threading.Thread) -> None:
    """Finish the answers; a second signal waits for none."""
    server.should_exit = True
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            server.force_exit = True


def callers_of(host: str, tokens: Path | None) -> dict[str, str] | None:
    """Who may ask there: bearer token -> name, or None for everybody on this machine.

    Raises `UserError` where the address could be reached by others without a token.
    """
    callers = read_callers(tokens) if tokens else None
    require_callers(host, callers)
    return callers


def require_callers(host: str, callers: Mapping[str, str] | None) -> None:
    """Raises `UserError` when others than this machine could ask without a token."""
    if callers is None and not _is_loopback(host):
        raise UserError(f"{host} can be reached from elsewhere; name a file of bearer tokens with --tokens.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
