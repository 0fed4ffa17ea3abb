"""`pilotflame` whose metrics can be switched while it runs: SIGUSR1 lets it count them, SIGUSR2 lets it stop.

Both states take turns in one process, so that their costs can be compared.
"""

from __future__ import annotations

import signal

from pilotflame import command
from telemetry import instruments


def start_counting() -> None:
    """Update metrics from now on."""
    instruments.expose()


def stop_counting() -> None:
    """Update no metrics from now on."""
    instruments.is_exposed = False
    for lookup in (instruments.counter, instruments.gauge, instruments.histogram):
        lookup.cache_clear()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda _number, _frame: start_counting())
    signal.signal(signal.SIGUSR2, lambda _number, _frame: stop_counting())
    command.main()
