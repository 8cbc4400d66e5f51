"""One change of the registry at a time, on all machines: MLflow has neither transactions nor conditional writes.

A local database is guarded by a lock file beside it. On a server the lock is a registered model called NAME.lock, which
the server lets only one client make; it names its holder. That of a process that died is taken over: on its machine at
once, elsewhere after `EXPIRES_S`, by somebody whom the server lets delete it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pipelines import processes, repository, stage, tracking
from pipelines.params import UserError

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient

WAIT_S, EXPIRES_S, POLL_S = 300, 600, 0.5  # what takes long, pushing weights, is done before it is taken


@contextmanager
def exclusively(client: MlflowClient, name: str) -> Iterator[None]:
    """While the block runs nobody else registers or promotes the model `name`.

    Raises `UserError` that names the holder when the lock is not free after `WAIT_S`.
    """
    if tracking.is_local():
        file = f"{tracking.lock_file()}.{name}"
        try:
            taken = FileLock(file).acquire(timeout=WAIT_S)
        except Timeout:
            raise UserError(f"another process holds {file} for {WAIT_S} s; let it end, then run again.") from None
        with taken:
            yield
        return
    lock = f"{name}.lock"
    _take(client, lock)
    try:
        yield
    finally:
        tracking.delete_model(client, lock, processes.tags())


def _take(client: MlflowClient, lock: str) -> None:
    deadline, told = time.monotonic() + WAIT_S, False
    description = f"{repository.person()} is changing the registry."
    while not tracking.create_model(client, lock, description, processes.tags()):
        holder = tracking.find_model(client, lock)
        if holder is None:
            continue
        if time.monotonic() > deadline:
            raise UserError(
                f"{holder.description} It has lasted {WAIT_S} s: ask there, or delete the registered model {lock} in "
                "the MLflow UI if nobody is at it."
            )
        if not told:
            told = True
            stage.say(f"registry   waiting: {holder.description}")
        if _is_left_behind(holder.tags.get("process", ""), holder.creation_timestamp / 1000):
            tracking.delete_model(client, lock, holder.tags)
        time.sleep(POLL_S)


def _is_left_behind(process: str, since: float) -> bool:
    here = process.startswith(f"{platform.node()}:")
    return not processes.is_alive(process) or (not here and time.time() - since > EXPIRES_S)
