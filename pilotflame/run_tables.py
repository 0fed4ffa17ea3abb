"""Tables of executions and of plans of replays for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pilotflame.command_error import escape_text

WIDTH = 160
"""Columns of a table that is written to a file or a pipe."""


def print_executions(executions: Sequence[Mapping[str, Any]]) -> None:
    """Print executions as a table: id, workflow, status, trigger, time, duration in seconds and error."""
    table = Table("Execution", "Workflow", "Status", "Trigger", "Created", "Seconds", "Error", box=None)
    for one in executions:
        error = one["error"] or {}
        cause = error.get("cause") or error
        seconds = "" if one["durationMs"] is None else f"{one['durationMs'] / 1000:.3f}"
        values = (one["id"], one["workflowId"], one["status"], one["triggerType"], one["createdAt"])
        table.add_row(*(Text(escape_text(str(value))) for value in (*values, seconds, cause.get("code", ""))))
    _console().print(table)


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print the plan of a replay: each node with its decision and the reasons."""
    table = Table("Node", "Decision", "Effect", "Reasons", box=None)
    for node in plan["nodes"]:
        decision = node["decision"] + (" (failed iterations)" if node["failedOnly"] else "")
        reasons = "; ".join(_reason_text(reason) for reason in node["reasons"])
        table.add_row(
            *(Text(escape_text(text)) for text in (node["nodeId"], decision, node["effect"], reasons))
        )
    console = _console()
    console.print(table)
    counts = ", ".join(f"{count} {decision}" for decision, count in plan["counts"].items() if count)
    summary = f"{counts}; about {plan['predictedSeconds']:.1f} s; definition: {plan['definition']}"
    console.print(Text(escape_text(summary)))
    if plan["removed"]:
        console.print(Text(f"removed: {', '.join(plan['removed'])}"))


def _reason_text(reason: Mapping[str, Any]) -> str:
    paths = ", ".join(reason["paths"])
    return f"{reason['code']} ({paths})" if paths else str(reason["code"])


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    return (
        console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=WIDTH)
    )
