"""Live view of a run on a terminal, node by node, with the texts that its models are writing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pilotflame import live_text
from pilotflame.command_error import escape_text

if TYPE_CHECKING:
    from pilotflame_sdk import RunEvent


MAX_ROWS: Final = 25
"""The most recently updated nodes; more would not fit on a screen."""
MAX_TEXTS: Final = 3
"""The most recently changed texts."""
MAX_TEXT_CHARACTERS: Final = 300
"""Shown end of each text."""
COLOURS: Final = {
    "completed": "green",
    "failed": "red",
    "running": "cyan",
    "retrying": "yellow",
    "waiting": "yellow",
    "skipped": "bright_black",
    "stopped": "yellow",
    "cancelled": "yellow",
}


class RunView:
    """Table of a run: a heading, and a row for each node, in loops for each iteration."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._execution: dict[str, Any] = {}
        self._spans: dict[tuple[str, int], dict[str, Any]] = {}
        self._texts: dict[tuple[str, str], str] = {}
        """Open texts, and steps of agents, by node id and iteration."""

    def take(self, event: RunEvent) -> None:
        """Update the table by an event of the run: its state, or a node; attempts are not shown."""
        if event.name == "execution":
            self._execution = event.data
        elif event.name == "span" and event.data["kind"] != "attempt":
            key = (event.data["nodeId"], event.data["iteration"])
            self._spans.pop(key, None)
            self._spans[key] = event.data
            if event.data["status"] not in {"running", "waiting"}:
                self._texts.pop(key, None)

    def take_step(self, event: RunEvent) -> None:
        """Update the texts below the table by an event of the steps of the run;
        events of the run's state are ignored.
        """
        if event.name == "execution":
            return
        place = (event.data["nodeId"], event.data["iteration"])
        before = self._texts.pop(place, "")
        match event.name:
            case "token":
                begun = before if event.data["offset"] else ""
                self._texts[place] = (begun + event.data["text"])[-MAX_TEXT_CHARACTERS:]
            case "retry":
                self._texts[place] = live_text.explain_retry(event.data)
            case "step" if event.data["kind"] == "tool":
                self._texts[place] = live_text.describe_call(event.data)

    def __rich__(self) -> Group:
        return Group(self._table(), *self._show_texts())

    def _show_texts(self) -> Iterable[Text]:
        """Yield the ends of the newest texts, each below its node."""
        for place, text in list(self._texts.items())[-MAX_TEXTS:]:
            yield Text(f"\n{live_text.name_place(place)}", style="bold")
            yield Text(escape_text(text))

    def _table(self) -> Table:
        """Return the table with its heading and the 25 most recently updated nodes."""
        table = Table(title=self._heading(), title_justify="left", box=None, pad_edge=False)
        for heading in ("node", "type", "status", "time"):
            table.add_column(heading, justify="right" if heading == "time" else "left", overflow="ellipsis")
        for span in list(self._spans.values())[-MAX_ROWS:]:
            table.add_row(
                Text(_name_node(span)),
                Text(span["nodeType"]),
                _style_status(span["status"]),
                _format_duration(span["durationMs"]),
            )
        return table

    def _heading(self) -> Text:
        """Return the heading of the table: name and status of the run, and its settled nodes, skipped ones included."""
        heading = Text.assemble(self._name, " ", _style_status(self._execution.get("status", "pending")))
        if total := self._execution.get("totalNodes"):
            heading.append(
                f" {self._execution['completedNodes']}/{total} settled ({self._execution['progress']} %)"
            )
        return heading


def show_run(name: str, events: Iterable[RunEvent], steps: Iterable[RunEvent] | None = None) -> None:
    """Show the nodes of a run on standard error while they change, at most 25; return at the end of its events.

    With the events of its `steps`, also the texts that its models write.
    """
    view, console = RunView(name), Console(file=sys.stderr)
    following = nullcontext() if steps is None else live_text.consume_in_thread(steps, view.take_step)
    with Live(view, console=console, refresh_per_second=8) as live, following:
        for event in events:
            view.take(event)
        live.refresh()
    if not console.is_terminal:
        console.print()  # the last table has no line feed there


def _name_node(span: dict[str, Any]) -> str:
    """Return the label of a node, with its iteration of a loop."""
    name: str = span["nodeLabel"] or span["nodeId"]
    return f"{name} [{span['iteration']}]" if span["iteration"] else name


def _style_status(status: str) -> Text:
    return Text(status, style=COLOURS.get(status, ""))


def _format_duration(milliseconds: int | None) -> str:
    return "" if milliseconds is None else f"{milliseconds / 1000:.3f} s"
