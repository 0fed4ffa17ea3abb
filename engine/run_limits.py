"""How much one run may take. Whatever goes beyond ends in an error that names the setting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunLimits:
    """Each is a setting of the process that runs nodes: `max_loop_items` is `PILOTFLAME_MAX_LOOP_ITEMS`."""

    max_output_bytes: int = 10_000_000
    """Bytes of one node's output as JSON."""
    max_log_lines: int = 10_000
    """Lines of one run's log."""
    max_loop_items: int = 10_000
    """Items of one loop."""
    max_iterations: int = 100_000
    """Turns of all loops of one run."""


def setting_name(name: str) -> str:
    """Return the environment variable that a limit is set by."""
    return f"PILOTFLAME_{name.upper()}"
