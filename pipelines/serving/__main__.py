"""One exported folder behind the endpoint, without a registry: what the stage `agreement` asks.

python -m pipelines.serving data/models/release 127.0.0.1 8000
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pipelines import stage
from pipelines.params import load_params
from pipelines.serving.manager import Manager
from pipelines.serving.server import run


def main(folder: str, host: str, port: str) -> None:
    """Serve until told to end; the model has the folder's name, and nobody's usage is kept."""
    params = load_params().serve
    manager = Manager(params)
    manager.switch(manager.load(Path(folder), Path(folder).name, "0"))
    with tempfile.TemporaryDirectory() as scratch:
        run(manager, params, host, int(port), usage=Path(scratch) / "usage.db")


if __name__ == "__main__":
    with stage.exits("serve"):
        main(*sys.argv[1:])
