"""Outputs that `pilotflame run` prints after a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Final

MAX_LINES: Final = 100
MAX_LINE_CHARACTERS: Final = 500


class OutputChoice(StrEnum):
    """Choice of the outputs to print."""

    LAST = "last"
    ALL = "all"
    NONE = "none"
    JSON = "json"


def select_last(outputs: Mapping[str, Any], connections: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the outputs of the nodes that no connection joins to a later node with an output, by node id.

    Connections are in either format of the API: with `sourceNodeId` or `source`, `targetNodeId` or `target`.
    """
    ends = [
        (edge.get("sourceNodeId", edge.get("source")), edge.get("targetNodeId", edge.get("target")))
        for edge in connections
    ]
    followed = {source for source, target in ends if target in outputs}
    return {node_id: output for node_id, output in outputs.items() if node_id not in followed}


def find_omitted(outputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the details of outputs that are too large for an answer and were left out, by node id."""
    return {
        node_id: output["omitted"]
        for node_id, output in outputs.items()
        if isinstance(output, dict) and output.keys() == {"$blob", "omitted"}
    }


def render(value: object) -> str:
    """Return a value as indented JSON text, with characters beyond ASCII as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def truncate(text: str) -> tuple[str, bool]:
    """Return a text truncated for a terminal, and whether it was truncated.

    It has at most 100 lines of 500 characters, and a line about those left out.
    """
    lines = text.splitlines()
    shown = [
        line if len(line) <= MAX_LINE_CHARACTERS else f"{line[:MAX_LINE_CHARACTERS]}…"
        for line in lines[:MAX_LINES]
    ]
    left_out = len(lines) - len(shown)
    if left_out:
        shown.append(f"… {left_out:,} more lines")
    return "\n".join(shown), shown != lines
