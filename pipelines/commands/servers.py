"""Commands that serve, on this machine only: the MLflow UI and the champion."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import typer

from pipelines.commands import PARAMS, RELEASE


def ui(port: int = 5000) -> None:
    """The MLflow server on 127.0.0.1, one worker; prints the address of the training view."""
    from pipelines.tracking import ui_address, ui_command

    _require_free(port)
    command, environment = ui_command(port)
    typer.echo(f"open {ui_address(port)}  (Ctrl-C ends it)")
    os.execvpe(command[0], command, environment)


def serve(port: int = 8000) -> None:
    """The champion behind an OpenAI-compatible endpoint on 127.0.0.1."""
    from pipelines.params import load_params
    from pipelines.register import champion_folder

    _require_free(port)
    folder = champion_folder(load_params(PARAMS).register_, RELEASE)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    body = json.dumps({"model": str(folder), "messages": [{"role": "user", "content": "What is AI?"}]})
    typer.echo(
        f"serving {folder} at http://127.0.0.1:{port}/v1 (Ctrl-C ends it); when it runs, ask in another terminal:\n"
        f"  curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    os.execvpe(command[0], [*command, "--host", "127.0.0.1", "--port", str(port)], environment)


def _require_free(port: int) -> None:
    import socket

    from pipelines.params import UserError

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} is in use on 127.0.0.1; name another with --port.")
