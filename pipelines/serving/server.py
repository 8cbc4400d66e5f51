"""The HTTP server of a `Manager`: uvicorn, until it is told to end; open answers are finished first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from pipelines.params import Serve
from pipelines.serving.app import create_app
from pipelines.serving.guard import read_callers
from pipelines.serving.ledger import Ledger
from pipelines.serving.manager import Manager

CALLERS = Path(".serve/callers")
DRAIN_S = 60  # for answers that are being given when the server is told to end


def run(
    manager: Manager, params: Serve, host: str, port: int, usage: Path, more: Callable[[], dict[str, Any]] = dict
) -> None:
    """Serve on host and port until SIGTERM or Ctrl-C. usage: the ledger's file. more: what /health says besides."""
    ledger = Ledger(usage, params)
    app = create_app(manager, params, ledger, callers(host), more)
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False}
    with suppress(KeyboardInterrupt):  # uvicorn ends in order, then raises the signal again
        uvicorn.Server(uvicorn.Config(app, host, port, timeout_graceful_shutdown=DRAIN_S, **quiet)).run()
    ledger.close()


def callers(host: str) -> dict[str, str] | None:
    """Bearer tokens and their owners; None where only this machine listens and nobody wrote the file.

    Raises `UserError` when other machines could ask without a token.
    """
    local = host in ("127.0.0.1", "::1", "localhost")
    return None if local and not CALLERS.exists() else read_callers(CALLERS)
