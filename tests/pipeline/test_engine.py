"""The engine and the manager without HTTP: what fails, what is cancelled, and versions that cannot be served."""

import asyncio
import queue
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from endpoint import NAME, PARAMS, made

from model.decoding import Batch
from pipelines.deployment import deploy, follow
from pipelines.serving.call import Call
from pipelines.serving.engine import Engine, Piece, QueueFull, Request
from pipelines.serving.manager import Manager
from pipelines.serving.protocol import CompletionRequest
from pipelines.serving.shapes import TextShape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("served") / "release", seed=3)


def test_an_engine_finishes_when_the_server_has_ended_before_it(folder: Path) -> None:
    engine, ended = Engine.load(folder, NAME, "7", PARAMS), threading.Event()
    engine.submit(Request([5, 6], 1, lambda _: ended.wait(20)))
    body = CompletionRequest(model=NAME, prompt=[7, 8])
    call = Call(engine, body, body.ids(), 4, TextShape(engine.text, logprobs=False))

    async def ask() -> None:
        call.start()

    asyncio.run(ask())
    ended.set()
    assert len(engine.complete([7, 8], 4, timeout_s=20)) > 0
    engine.close()
    assert call.request.completion_tokens > 0


def test_those_who_hung_up_in_the_queue_take_no_place_in_it(folder: Path) -> None:
    engine, begun, goes_on = Engine.load(folder, NAME, "7", PARAMS), threading.Event(), threading.Event()
    engine.submit(Request([5, 6], 2, lambda _: (begun.set(), goes_on.wait(20))))
    assert begun.wait(20)
    pieces: list[Piece] = []
    requests = [Request([7, 8], 2, pieces.append) for _ in range(2 * PARAMS.max_queue)]
    for request in requests[: PARAMS.max_queue]:
        engine.submit(request)
        request.cancel()
    for request in requests[PARAMS.max_queue :]:
        engine.submit(request)
    assert engine.waiting == PARAMS.max_queue
    with pytest.raises(QueueFull):
        engine.submit(Request([7, 8], 2, pieces.append))
    goes_on.set()
    engine.close()
    assert sum(piece.finish_reason is not None for piece in pieces) == PARAMS.max_queue


def test_a_step_that_fails_is_told_once_and_the_next_request_is_answered(folder: Path, monkeypatch) -> None:
    engine = Engine.load(folder, NAME, "7", PARAMS)
    pieces: list[Piece] = []
    with monkeypatch.context() as broken:
        broken.setattr(Batch, "join", lambda *_: 1 / 0)
        engine.submit(Request([5, 6], 4, pieces.append))
        with pytest.raises(RuntimeError, match="the engine failed; try again"):
            engine.complete([7, 8], 4)
    assert sum(len(piece.tokens) for piece in engine.complete([7, 8], 4)) == 4
    engine.close()
    assert [piece.finish_reason for piece in pieces] == ["error"]


def test_a_prompt_that_cannot_be_opened_ends_alone(folder: Path, monkeypatch) -> None:
    engine = Engine.load(folder, NAME, "7", PARAMS)
    opened = engine._opened
    monkeypatch.setattr(engine, "_opened", lambda request: {}[0] if request.prompt == [9] else opened(request))
    neighbour: queue.Queue[Piece] = queue.Queue()
    engine.submit(Request([7, 8], 200, neighbour.put))
    with pytest.raises(RuntimeError, match="the engine failed; try again"):
        engine.complete([9], 4, timeout_s=10)
    engine.close()
    assert [piece.finish_reason for piece in neighbour.queue][-1] in ("stop", "length")


def before_version_2(folder: Path, monkeypatch) -> tuple[Manager, follow.Follower]:
    """Version 1 answers, and the alias has just moved to version 2; there is no registry."""
    manager, found = Manager(PARAMS), SimpleNamespace(version="2")
    manager.switch(manager.load(folder, NAME, "1"))
    monkeypatch.setattr(follow.tracking, "connect", lambda: None)
    monkeypatch.setattr(follow.tracking, "version_behind", lambda *_: found)
    monkeypatch.setattr(deploy, "prepare", lambda *_: deploy.Model(found, folder))
    monkeypatch.setattr(deploy, "tag", lambda *_, **__: None)
    return manager, follow.Follower(manager, deploy.Target(NAME, "champion"), None, "here")


@pytest.mark.parametrize(("place", "name"), [(Batch, "join"), (follow, "smoke")])
def test_a_version_that_fails_is_told_and_leaves_nothing_behind(folder: Path, monkeypatch, place, name: str) -> None:
    """In its first answer, or in its smoke test with an error that nobody foresaw."""
    manager, follower = before_version_2(folder, monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr(place, name, lambda *_: {}[name])
        follower._look()
    refused = follower.health()["follows"]["refused"]
    assert refused["version"] == "2" and "Error: " in refused["why"] and refused["why"].endswith(".")
    assert manager.current.version == "1" and len(manager.current.complete([7], 2)) > 0
    manager.close()
    assert not [thread for thread in threading.enumerate() if thread.name == f"engine {NAME} 2"]


def test_a_server_that_ends_changes_its_model_no_more(folder: Path, monkeypatch) -> None:
    manager, follower = before_version_2(folder, monkeypatch)
    smoke = follow.smoke
    with monkeypatch.context() as ending:
        ending.setattr(follow, "smoke", lambda engine: (smoke(engine), follower.stop()))
        follower._look()
    assert manager.current.version == "1"
    manager.close()
    follower._look()
    assert manager.current is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(f"engine {NAME} 2")]
