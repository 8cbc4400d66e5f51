"""The process that serves: started in the background, found again, asked, ended.

Its state is .serve/server.json (process, address, model, engine), its output .serve/server.log. A state whose
process is gone, after kill -9 for example, counts as none.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

from pipelines import processes, stage
from pipelines.deployment.deploy import SERVING, Model, Target
from pipelines.params import UserError
from pipelines.serving.guard import read_callers

STATE, LOG = SERVING / "server.json", SERVING / "server.log"
READY_S, STOP_S, SWITCH_S = 300.0, 60.0, 120.0  # patience with a start, with open answers, with a switch
QUESTION = "How are you?"


def running() -> dict[str, Any] | None:
    """The state of the server of this repository, None when none runs."""
    try:
        state = json.loads(STATE.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return state if processes.is_alive(state["process"]) else None


def require_free(host: str, port: int) -> None:
    """Raises `UserError` when this repository serves already, or when the port is taken."""
    if state := running():
        raise UserError(
            f"{state['model']} is served already at {state['address']}; it follows its alias, "
            "`shovel deploy --stop` ends it."
        )
    require_port(host, port)


def require_port(host: str, port: int) -> None:
    """Raises `UserError` when the port is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"port {port} cannot be used on {host} ({why}); name another with --port.") from None


def url(host: str, port: int | str) -> str:
    """The URL of a host and port; an IPv6 address stands in brackets there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def claim(
    where: Target, engine: str, host: str, port: int, model: Model | None, pid: int | None = None
) -> dict[str, Any]:
    """Write the state of a process, this one when none is given; it stays the same when it becomes another program.

    model: what it serves, where it does not follow an alias. Returns the state.
    """
    process = psutil.Process(pid)
    state = {"address": url(host, port), "engine": engine, "log": str(LOG), "model": str(where)}
    state |= {"version": model and model.version.version, "folder": model and str(model.folder)}
    state |= {"pid": process.pid, "process": processes.identity(process)}
    stage.write_json(STATE, state)
    return state


def version(state: dict[str, Any]) -> str:
    """Which version answers there now."""
    return state["version"] or (health(state["address"]) or {}).get("version", "unknown")


def start(command: Sequence[str], environment: Mapping[str, str], output: Path = LOG) -> subprocess.Popen[bytes]:
    """A process of its own session, which outlives this one; its output goes into a file."""
    output.parent.mkdir(exist_ok=True)
    with output.open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of one folder, which ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.serving", str(folder), "127.0.0.1", str(port)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_STAGE")}
    output = SERVING / f"{port}.log"
    process = start(command, environment, output)
    try:
        await_ready(process, f"http://127.0.0.1:{port}", folder.name, output=output)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.unlink()


def await_ready(
    process: subprocess.Popen[bytes], address: str, name: str, tokens: Path | None = None, output: Path = LOG
) -> None:
    """Wait until the server answers a question to the model `name`.

    Raises `UserError` with the server's own last words when it ends before.
    """
    deadline = time.monotonic() + READY_S
    headers = {"Authorization": f"Bearer {next(iter(read_callers(tokens)))}"} if tokens else {}
    with stage.progress("deploy", None) as advance:
        while not _answers(address, name, headers):
            advance(0)
            if process.poll() is not None:
                lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
                raise UserError(f"the server ended: {lines[-1].removeprefix('deploy: ')}")
            if time.monotonic() > deadline:
                process.terminate()
                raise UserError(f"the server did not answer within {READY_S:.0f} s; see {output}.")
            time.sleep(0.25)


def _answers(address: str, name: str, headers: dict[str, str]) -> bool:
    """The smoke test from outside: whether a question gets an answer."""
    body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}
    with suppress(requests.RequestException, KeyError, ValueError):
        done = requests.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)
        return done.ok and bool(done.json()["choices"])
    return False


def health(address: str) -> dict[str, Any] | None:
    """What the server says of itself, None when it does not answer."""
    with suppress(requests.RequestException, ValueError):
        return requests.get(f"{address}/health", timeout=5).json()
    return None


def await_version(where: Target, version: int) -> float | None:
    """Seconds until the server of this repository answers with that version; None when none follows this alias.

    Raises `UserError` with the reason when the server refuses the version, or takes too long.
    """
    state, start_s = running(), time.monotonic()
    if state is None or state["model"] != str(where) or state["engine"] != "builtin":
        return None
    while time.monotonic() - start_s < SWITCH_S:
        found = health(state["address"]) or {}
        if str(found.get("version")) == str(version):
            return time.monotonic() - start_s
        refused = (found.get("follows") or {}).get("refused") or {}
        if refused.get("version") == str(version):
            raise UserError(f"{where} moved, but version {found.get('version')} goes on serving: {refused['why']}")
        time.sleep(0.2)
    raise UserError(f"{where} moved, but after {SWITCH_S:.0f} s the old version still serves; see {state['log']}.")


def stop() -> dict[str, Any] | None:
    """End the server after the answers that it is giving; its state, None when none ran."""
    state = running()
    if state is None:
        return None
    process, deadline = psutil.Process(state["pid"]), time.monotonic() + STOP_S
    process.terminate()
    while running() and time.monotonic() < deadline:
        time.sleep(0.1)
    if running():
        process.kill()
    STATE.unlink(missing_ok=True)
    return state
