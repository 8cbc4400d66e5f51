"""Who used how many tokens, and what they cost: a SQLite file with a row for each answer."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines import stage
from pipelines.params import Serve, UserError
from pipelines.serving.protocol import Usage

LEDGER = Path(".serve/usage.db")
TABLE = """CREATE TABLE IF NOT EXISTS usage (
  time TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')), caller TEXT NOT NULL, model TEXT NOT NULL,
  version TEXT NOT NULL, endpoint TEXT NOT NULL, prompt INTEGER NOT NULL, cached INTEGER NOT NULL,
  completion INTEGER NOT NULL, cost REAL NOT NULL, currency TEXT NOT NULL)"""
SUMS = """SELECT caller, model, version, count(*) AS requests, sum(prompt) AS prompt, sum(cached) AS cached,
  sum(completion) AS completion, sum(cost) AS cost, currency FROM usage WHERE time >= ?
  GROUP BY caller, model, version, currency ORDER BY caller, model, version"""


class Ledger:
    """The file, open for adding in a thread of its own. Prices are those of the moment and stay with each row."""

    def __init__(self, file: Path, params: Serve) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._params, self._writer = params, ThreadPoolExecutor(1, "ledger")
        try:
            self._database = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=30)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(TABLE)
        except sqlite3.Error as error:
            raise UserError(f"{file} cannot be used as a ledger ({error}); move it away, a new one is made.") from None

    def add(self, caller: str, model: str, version: str, endpoint: str, usage: Usage) -> None:
        """One answer; it is written soon, and nobody waits for that."""
        row = (caller, model, version, endpoint, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        self._writer.submit(self._write, (*row, cost(usage, self._params), self._params.currency))

    def _write(self, row: tuple[Any, ...]) -> None:
        statement = (
            "INSERT INTO usage (caller, model, version, endpoint, prompt, cached, completion, cost, currency)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        try:
            self._database.execute(statement, row)
        except sqlite3.Error as error:
            stage.say(f"serve      an answer is missing in the ledger: {error}")

    def close(self) -> None:
        """No more rows; those that were added are written first."""
        self._writer.shutdown()
        self._database.close()


def cost(usage: Usage, params: Serve) -> float:
    """Of one answer, in `params.currency`; cached prompt tokens have a price of their own."""
    fresh = usage.prompt_tokens - usage.cached_tokens
    millionths = fresh * params.prompt_price + usage.cached_tokens * params.cached_price
    return (millionths + usage.completion_tokens * params.completion_price) / 1e6


def totals(file: Path, since: str = "") -> list[dict[str, Any]]:
    """Sums by caller, model and version; since: a day or a time in ISO 8601, of UTC where it names no zone; from the
    beginning when empty. Raises `UserError`."""
    try:
        start = datetime.fromisoformat(since or "0001-01-01")
    except ValueError:
        raise UserError(f"{since!r} is no day or time; write 2026-01-31 or 2026-01-31T12:00:00Z.") from None
    if not file.exists():
        return []
    start = start.replace(tzinfo=start.tzinfo or UTC).astimezone(UTC)
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
            database.row_factory = sqlite3.Row
            rows = [dict(row) for row in database.execute(SUMS, (start.isoformat(timespec="seconds"),))]
        database.close()
    except sqlite3.Error as error:
        raise UserError(f"{file} cannot be read as a ledger ({error}); move it away, a new one is made.") from None
    return rows
