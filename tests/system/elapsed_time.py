"""Simulated passage of time: past events are moved further back in the database."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.02
MINUTE_MICROSECONDS = 60_000_000
UNTIL_IT_SLEEPS = re.compile(r"^until .*stopped", re.MULTILINE)
"""Wait of documents for a workflow to sleep, which takes a minute by its policy."""


def age_by_a_minute(database: Path) -> None:
    """Move the last activity of deployments and the ends of runs back by a minute, once all runs have ended."""
    connection = sqlite3.connect(database, timeout=PATIENCE_SECONDS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while connection.execute("SELECT 1 FROM execution WHERE ended_at IS NULL").fetchone():
        assert time.monotonic() < deadline, "a run does not end"
        time.sleep(POLL_SECONDS)
    with connection:
        connection.execute(
            "UPDATE deployment SET last_activity_at = last_activity_at - ?", (MINUTE_MICROSECONDS,)
        )
        connection.execute(
            "UPDATE execution SET ended_at = ended_at - ? WHERE ended_at IS NOT NULL", (MINUTE_MICROSECONDS,)
        )
    connection.close()
