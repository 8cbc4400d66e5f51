"""A command of `shovel` as a process of its own, forked from one that has imported the libraries already.

What is ours is imported by each command anew, from the project that it runs in. Importing MLflow, DVC and model_signing
takes five seconds, and the tests run a hundred commands.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

LIBRARIES = ["mlflow.store.tracking.sqlalchemy_store", "dvc.repo", "model_signing.signing", "model_signing.verifying"]
os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"  # read when MLflow is imported, as pipelines.tracking sets it
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(LIBRARIES)


def forked(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Exit code and output of `shovel` with these words in that folder, as `subprocess.run` has them."""
    with TemporaryDirectory() as outputs:
        files = [Path(outputs, name) for name in ("stdout", "stderr")]
        process = _processes.Process(target=_command, args=(words, folder, environment, files))
        process.start()
        process.join()
        return subprocess.CompletedProcess(["shovel", *words], process.exitcode, *(file.read_text() for file in files))


def _command(words: list[str], folder: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    for number, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = ["shovel", *words]
    runpy.run_module("pipelines.cli", run_name="__main__", alter_sys=True)
