"""Limits of one run. Exceeding one fails with an error that names its setting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunLimits:
    """Limits, each a setting of the process that runs nodes: `max_loop_items` is `PILOTFLAME_MAX_LOOP_ITEMS`."""

    max_output_bytes: int = 10_000_000
    """Bytes of the output of one node, as JSON."""
    max_log_lines: int = 10_000
    """Lines in the log of one run."""
    max_loop_items: int = 10_000
    """Items of one loop."""
    max_iterations: int = 100_000
    """Iterations of all loops of one run."""


def setting_name(name: str) -> str:
    """Return the name of the environment variable that changes the limit `name`, a field of `RunLimits`."""
    return f"PILOTFLAME_{name.upper()}"
