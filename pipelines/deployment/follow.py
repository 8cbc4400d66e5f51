"""The server of our own engine, which follows an alias: another version is loaded beside, tried, and takes over.

    python -m pipelines.deployment.follow shovel-demo@champion 127.0.0.1 8000          `shovel deploy` starts this

Every few seconds the registry is asked which version the alias names. A new one is checked as at the start and answers
a question before requests go to it; the old one finishes what it has. A version that fails leaves the old one
serving: the log, the tag `deploy.refused` and /health say so. A registry that is away changes nothing.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines import stage, tracking
from pipelines.deployment import deploy, endpoint
from pipelines.params import Params, UserError, load_params
from pipelines.serving.engine import Engine
from pipelines.serving.manager import Manager
from pipelines.serving.server import callers_of, run

POLL_S, RETRY_S = 2.0, 30.0  # seconds between two looks at the alias, and before a refused version is tried again
SMOKE = [{"role": "user", "content": "How are you?"}]
SMOKE_TOKENS = 8


class Follower:
    """Keeps `manager` at the version that an alias names, in a thread of its own."""

    def __init__(self, manager: Manager, where: deploy.Target, params: Params, address: str) -> None:
        self._manager, self._where, self._params, self._address = manager, where, params, address
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"follow {where}", daemon=True)
        self._refused: dict[str, str] | None = None
        self._retry_s = 0.0
        self._silent_since: float | None = None

    @cached_property
    def _client(self) -> tracking.MlflowClient:
        return tracking.connect()

    def start(self) -> None:
        """Serve the version of now, then follow. Raises `UserError` when it may not be served."""
        self._serve()
        self._thread.start()

    def stop(self) -> None:
        """Follow no longer. Waits."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def health(self) -> dict[str, Any]:
        """What /health says of the alias: the refused version with its reason, and whether the registry answers."""
        silent = None if self._silent_since is None else round(time.monotonic() - self._silent_since)
        return {"follows": {"alias": str(self._where), "refused": self._refused, "registry_silent_s": silent}}

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001  whatever happens to the next version, this one goes on
                stage.say(f"follow     {type(error).__name__}: {error}")

    def _look(self) -> None:
        """Bring the alias' version, when it is another one than that which answers."""
        found, current = self._version(), self._manager.current
        if found is None or current is None:  # the server ends
            return
        if found.version == current.version:
            self._refused = None
            return
        if self._refused and self._refused["version"] == found.version and time.monotonic() < self._retry_s:
            return
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  whatever is wrong with the new version, the old one serves
            self._refuse(found, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}.")

    def _version(self) -> tracking.ModelVersion | None:
        """The version behind the alias; None when there is none, or when the registry does not answer."""
        try:
            found = tracking.version_behind(self._client, self._where.name, self._where.alias)
        except Exception as error:  # noqa: BLE001  any failure of the registry
            if self._silent_since is None:
                stage.say(f"follow     the registry does not answer ({type(error).__name__}); serving goes on")
                self._silent_since = time.monotonic()
            return None
        self._silent_since = None
        return found

    def _serve(self) -> None:
        """Check, load beside, try, switch."""
        model = deploy.prepare(self._client, self._where, self._params)
        engine = self._manager.load(model.folder, self._where.name, model.version.version)
        try:
            smoke(engine)
        except Exception as error:  # noqa: BLE001  a chat template, too, may raise anything
            engine.close()
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"version {engine.version} of {engine.name} fails its smoke test ({why}).") from None
        # first: who finds this version answering finds it noted
        deploy.tag(self._client, model.version, "deployed", address=self._address, engine="builtin")
        if self._stopping.is_set():
            engine.close()
            return
        self._manager.switch(engine)
        self._refused = None
        stage.say(f"follow     {engine.name} version {engine.version} answers at {self._address}")

    def _refuse(self, version: tracking.ModelVersion, why: str) -> None:
        known, self._refused = self._refused, {"version": version.version, "why": why}
        self._retry_s = time.monotonic() + RETRY_S
        if known == self._refused:
            return
        current = self._manager.current
        stage.say(f"follow     {why} Version {current.version if current else 'none'} goes on serving.")
        deploy.tag(self._client, version, "deploy.refused", address=self._address, why=why)


def smoke(engine: Engine) -> None:
    """Let an engine answer one question. Raises `ValueError` for an answer that no sound model gives."""
    prompt = engine.text.chat(SMOKE) if engine.text.chat_template else engine.text.encode(SMOKE[0]["content"])
    pieces = engine.complete(prompt, SMOKE_TOKENS, logprobs=1)
    scored = [token for piece in pieces for token in piece.scored]
    if not scored or not all(token.logprob is not None and math.isfinite(token.logprob) for token in scored):
        raise ValueError("it wrote no token, or one whose probability is no number")


def main(text: str, host: str, port: str, tokens: str = "") -> None:
    """Serve what an alias names until told to end. tokens: file with bearer tokens.

    Raises `UserError` when the alias' version may not be served, or when strangers could ask.
    """
    params = load_params()
    where = deploy.target(text, params.register_.name)
    callers = callers_of(host, Path(tokens) if tokens else None)
    manager = Manager(params.serve)
    follower = Follower(manager, where, params, endpoint.url(host, port))
    try:
        run(manager, params.serve, host, int(port), callers, more=follower.health, begin=follower.start)
    finally:
        follower.stop()


if __name__ == "__main__":
    with stage.exits("deploy"):
        main(*sys.argv[1:])
