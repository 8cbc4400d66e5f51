"""What surrounds every stage's pure function: checked parameters, tracking, exact outputs, one clear line at the end.

A stage module ends with

    if __name__ == "__main__":
        stage.main("clean", lambda params, run: clean(params.clean, RAW, CLEAN, CHAT))

The function returns its metrics as a dict: they go to reports/<name>.json and to MLflow. Exit codes: 0 done, 2 a
mistake that the message tells how to mend, 130 interrupted, 1 a defect of ours (with traceback).
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import live, processes, repository, tracking
from pipelines.params import Params, UserError, load_params, require_merged

REPORTS = Path("reports")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = 32 << 20  # bytes on the disk that a stage leaves to DVC and MLflow, which take a full disk badly
console = Console(stderr=True, highlight=False)


def main(name: str, function: Callable[[Params, tracking.Run], Mapping[str, Any]], variant: str = "") -> None:
    """Run a stage as a command.

    name: the stage, which is also its section of params.yaml. variant: distinguishes runs of one stage, as in
    `evaluate` of `base` and of `chat`. Writes reports/<name>[-variant].json and reports/runs/<same>.json.
    """
    label = f"{name}-{variant}" if variant else name
    global _file
    with exits(label), live.stage_progress(label, _reason) as _file:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"{name} works on one device; start it with `torchrun --nproc-per-node 1`.")
        params = load_params()
        require_room()
        before = repository.fingerprint(os.environ.get("DVC_STAGE", ""))
        with tracking.stage_run(label, getattr(params, name, None)) as run:
            metrics = function(params, run)
            require_unedited(label, before)
            run.log(flat(metrics))
            write_json(REPORTS / f"{label}.json", metrics)
            write_json(REPORTS / "runs" / f"{label}.json", {"experiment_id": run.experiment_id, "run_id": run.run_id})
            require_room()


_file = live.Progress(None)  # where this process' stage tells how far it is


@contextmanager
def exits(label: str) -> Iterator[None]:
    """Turn a person's mistakes into one sentence and an exit code; put back what DVC removed before a failed stage."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    warnings.formatwarning = lambda message, *_, **__: f"{label}: {message}\n"
    try:
        yield
        return
    except BaseException as error:
        failed, found = error, advice(error)
        restore_outputs()
        if found is None:
            raise
    print(f"{label}: {found[0]}", file=sys.stderr)
    if _device_failed(failed):
        sys.stderr.flush()
        os._exit(found[1])  # a plugin's exit handler would wait for the device, which never answers again
    sys.exit(found[1])


def _device_failed(error: BaseException) -> str | None:
    """What a device said that failed; None where no device was in use or it is not to blame."""
    devices = sys.modules.get("moe_kernels.device")
    return devices.failure(error) if devices else None


_interrupted = threading.Event()


def _interrupt(*_: Any) -> None:
    """Ctrl-C, remembered: where a callback that forgets exceptions swallows it, the next `advance` raises it again."""
    _interrupted.set()
    raise KeyboardInterrupt


def advice(error: BaseException) -> tuple[str, int] | None:
    """(sentence, exit code) for what a person can mend; None for a defect of ours, which deserves its traceback."""
    match error:
        case UserError():
            return str(error), 2
        case KeyboardInterrupt():
            return f"interrupted; the previous output is unchanged{f', {error}' if str(error) else ''}.", 130
        case _ if _disk_is_full(error):
            where = getattr(error, "filename", None) or Path.cwd()
            return f"the disk is full ({where}); free some space and run again, the previous output is unchanged.", 2
        case RuntimeError() if reason := _device_failed(error):
            return f"the device failed: {reason.rstrip('.')}; run again, the previous output is unchanged.", 2
        case PermissionError() if error.filename:
            return f"{error.filename} is not yours to use; correct its permissions and run again.", 2
        case _ if "mlflow.exceptions" in sys.modules and (sentence := tracking.trouble(error)):
            return sentence, 2
    return None


def _reason(error: BaseException) -> str:
    found = advice(error)
    return found[0] if found else f"{type(error).__name__}: {error}"


def require_unedited(label: str, before: dict[str, str]) -> None:
    """DVC notes what a stage read when it has ended; raises `UserError` when that is no longer what it did read."""
    after = repository.fingerprint(os.environ.get("DVC_STAGE", ""))
    if edited := sorted(key for key in before | after if before.get(key) != after.get(key)):
        more = f" and {len(edited) - 1} more" if len(edited) > 1 else ""
        raise UserError(
            f"{edited[0]}{more} was edited while {label} ran, and DVC would record the new state for the old result; "
            f"undo the edit to go on from the last checkpoint, or run again with it."
        )


def require_room() -> None:
    """Raises `OSError` (no space left) when less than `ROOM` is free here."""
    if shutil.disk_usage(Path.cwd()).free < ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path.cwd()))


def _disk_is_full(error: BaseException | None) -> bool:
    """Also where a library wrapped the system's error, or kept only its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(words in str(error) for words in (*map(os.strerror, FULL), "database or disk is full")):
            return True
        error = error.__cause__ or error.__context__
    return False


def restore_outputs() -> None:
    """Bring back the last outputs of the running DVC stage: DVC deletes them before it starts a command.

    Outside of `dvc repro` nothing was deleted, and nothing is done. Files come from DVC's cache as links, which a full
    disk still takes; what git keeps (`cache: false`) is in the cache for DVC's run-cache, or else in the commit.
    """
    address = os.environ.get("DVC_STAGE")
    outputs = repository.stages().get(address, {}).get("outs", []) if address else []
    for output in outputs:
        path, md5 = Path(output["path"]), output["md5"]
        try:
            with replacing(path) as fresh:
                repository.check_out(md5, path, fresh)
        except OSError as error:
            print(f"{path}: the previous content could not be restored ({error.strerror})", file=sys.stderr)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a fresh path beside `target`; when the block succeeds it takes `target`'s place, else it is removed.

    The block creates a file or a folder there. A reader sees the old content or the new, never a half; only where two
    folders cannot change places (elsewhere than on Linux, or by the file system) there is a moment without either.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    ours = f"{threading.get_native_id()}-{processes.identity().replace(':', '+')}"
    fresh, old = (target.with_name(f".{target.name}.{word}-{ours}") for word in ("new", "old"))
    remove(fresh)
    try:
        yield fresh
        if not target.is_dir():
            fresh.replace(target)
        elif not _exchange(fresh, target):
            target.rename(old)
            fresh.replace(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        remove(fresh)
        remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sweep(target: Path) -> None:
    """Remove what processes that died in `replacing` left beside `target`, but not the only content that there is."""
    for word in ("new", "old") if target.exists() else ("new",):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{word}-*-*+*+*"):
            process = path.name.removeprefix(f".{target.name}.{word}-").partition("-")[2].replace("+", ":")
            if not processes.is_alive(process):
                with suppress(OSError):
                    remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Sorted, indented JSON that replaces `path` in one step."""
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, made_by: str) -> Any:
    """The JSON that stage `made_by` wrote; raises `UserError` naming that stage when it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro {made_by}` makes it.") from None
    except json.JSONDecodeError:
        require_merged(path)
        raise UserError(f"{path} is damaged; `dvc repro -f {made_by}` makes it again.") from None


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as {"a/b": number}; what is not a number is left out."""
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (bool, int, float)):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers


def say(text: str) -> None:
    """One line for the person who waits."""
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, and the stage's progress file. Yields `advance(amount=1, text="", **figures_of_a_step)`."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not console.is_terminal
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task(description, total=total, text="")
        _file.begin(description, total)

        def advance(amount: float = 1, text: str = "", **figures: Any) -> None:
            _file.advance(amount, figures)
            if _interrupted.is_set():
                raise KeyboardInterrupt
            bars.update(task, advance=amount, **({"text": text} if text else {}))
            if figures.get("replayed"):  # took no time, so it tells nothing of the time left
                bars.reset(task, completed=bars.tasks[0].completed)

        yield advance
