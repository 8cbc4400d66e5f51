"""The engine of the moment: another is loaded beside it, takes over between two requests, and the old one drains."""

from __future__ import annotations

import threading
from pathlib import Path

from pipelines.params import Serve
from pipelines.serving.engine import Engine


class Manager:
    """Holds the current engine; `load`, then `switch`, changes the model without losing a request."""

    def __init__(self, params: Serve) -> None:
        self.params = params
        self.current: Engine | None = None
        self._lock = threading.Lock()
        self._draining: list[threading.Thread] = []

    def load(self, folder: Path, name: str, version: str) -> Engine:
        """An engine of the exported `folder` beside the current one; raises `UserError`."""
        return Engine.load(folder, name, version, self.params)

    def switch(self, engine: Engine) -> None:
        """Requests from here on go to `engine`; the old one answers those it has, in the background, and ends."""
        with self._lock:
            old, self.current = self.current, engine
            self._draining = [thread for thread in self._draining if thread.is_alive()]
            if old is not None and old is not engine:
                self._draining.append(threading.Thread(target=old.close, name=f"drain {old.version}"))
                self._draining[-1].start()

    def close(self) -> None:
        """Answer what is here and end all engines. Waits."""
        with self._lock:
            engine, self.current = self.current, None
        if engine is not None:
            engine.close()
        for thread in self._draining:
            thread.join()
