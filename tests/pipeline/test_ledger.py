"""Usage from a day on: what `shovel usage --since` counts."""

import sqlite3
from pathlib import Path

import pytest

from pipelines.params import UserError
from pipelines.serving import ledger
from pipelines.serving.ledger import totals


@pytest.mark.parametrize(
    ("since", "requests"),
    [("", 3), ("2026-01-31", 2), ("2026-01-31 12:00", 1), ("2026-01-31T13:00:00+02:00", 2), ("2999-01-01", 0)],
)
def test_usage_counts_from_a_day_or_a_time_of_any_zone(tmp_path: Path, since: str, requests: int) -> None:
    with sqlite3.connect(tmp_path / "usage.db") as database:
        database.execute(ledger.TABLE)
        for time in ("2026-01-30T23:59:59Z", "2026-01-31T11:30:00Z", "2026-01-31T12:00:00Z"):
            database.execute("INSERT INTO usage VALUES (?, 'ada', 'm', '1', 'chat', 1, 0, 1, 0.1, 'EUR')", (time,))
    database.close()
    assert sum(row["requests"] for row in totals(tmp_path / "usage.db", since)) == requests
    with pytest.raises(UserError, match="'yesterday' is no day or time; write 2026-01-31"):
        totals(tmp_path / "usage.db", "yesterday")
