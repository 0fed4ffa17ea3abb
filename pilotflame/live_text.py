"""Texts that models write in a run, and the steps of its agents, on a terminal or in a file while they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from msgspec import Struct

from pilotflame.command_error import escape_text

if TYPE_CHECKING:
    from pilotflame_sdk import RunEvent

MAX_ARGUMENTS: Final = 200
"""Shown characters of the arguments of a tool call."""
END_SECONDS: Final = 2.0
"""Time after the end of a run for the last events to arrive."""
REASONS: Final = {"worker-lost": "its worker was lost", "interrupted": "it was interrupted"}
Place: TypeAlias = tuple[str, str]
"""Node id and iteration."""


class PrintedText(Struct):
    """Text of one answer of a model, as far as it is printed."""

    number: int
    attempt: int
    length: int = 0


class TextPrinter:
    """Prints texts as they come, each behind a line with its node; steps of agents have lines of their own.

    A text that begins again is printed again behind a line that says so: what is printed can't be taken back.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._texts: dict[Place, PrintedText] = {}
        self._current: Place | None = None
        """Place whose text the last printed line belongs to."""

    def take(self, event: RunEvent) -> None:
        """Print an event of the steps of a run: a part of a model's text, the restart of a text, or a step of an agent;
        other events are ignored.
        """
        match event.name:
            case "token":
                self._take_token(event.data)
            case "retry":
                self._take_retry(event.data)
            case "step":
                self._take_step(event.data)

    def close(self) -> None:
        """End the line of an open text, if there is one; more events may follow."""
        if self._current is not None:
            self._write("\n")
            self._current = None

    def _take_token(self, data: Mapping[str, Any]) -> None:
        """Print the part of a text that is not printed yet, since a new connection sends texts from their beginning.

        Nothing is printed if a part before it was missed.
        """
        place = _place_of(data)
        text = self._texts.get(place)
        if text is None or (text.number, text.attempt) != (data["number"], data["attempt"]):
            if text is not None and text.number == data["number"]:
                # The word about it was lost with a connection.
                self._print_line(f"{name_place(place)}: begins again")
            text = self._texts[place] = PrintedText(data["number"], data["attempt"])
        if data["offset"] > text.length:
            return  # its beginning was missed: the output of the node has it
        part = data["text"][text.length - data["offset"] :]
        if part:
            text.length += len(part)
            self._print_text(place, part)

    def _take_retry(self, data: Mapping[str, Any]) -> None:
        """Print that a text begins again, and why, if a part of it was printed."""
        place = _place_of(data)
        if self._texts.pop(place, None) is not None:
            self._print_line(f"{name_place(place)}: {explain_retry(data)}")

    def _take_step(self, data: Mapping[str, Any]) -> None:
        """Print a line about a tool call, or the unprinted rest of a completed answer."""
        place = _place_of(data)
        if data["kind"] == "tool":
            self._print_line(f"{name_place(place)}: {describe_call(data)}")
        elif data["status"] == "completed":
            self._print_rest(place, data)

    def _print_rest(self, place: Place, data: Mapping[str, Any]) -> None:
        """Print the part of a completed answer that no token has brought,
        since the last ones may be late for the stream.
        """
        answer = data["result"] if isinstance(data["result"], dict) else {}
        whole = answer.get("text")
        known = self._texts.pop(place, None)
        length = known.length if known is not None and known.number == data["number"] else 0
        if isinstance(whole, str) and len(whole) > length:
            self._print_text(place, whole[length:])

    def _print_text(self, place: Place, text: str) -> None:
        if self._current != place:
            self.close()
            self._write(escape_text(f"{name_place(place)}:") + "\n")
            self._current = place
        self._write(escape_text(text))

    def _print_line(self, text: str) -> None:
        self.close()
        self._write(escape_text(text) + "\n")


def explain_retry(data: Mapping[str, Any]) -> str:
    """Return the words for an event of a text that is written again from its beginning, with the reason."""
    reason = REASONS.get(data["reason"], f"the call failed: {data['reason']}")
    return f"begins again, since {reason}"


def describe_call(step: Mapping[str, Any]) -> str:
    """Return the state of a tool call in words, such as `calls search {"city": "Oslo"}`."""
    name, status = step["name"], step["status"]
    if status == "started":
        arguments = json.dumps(step["arguments"], ensure_ascii=False)
        shown = arguments if len(arguments) <= MAX_ARGUMENTS else f"{arguments[:MAX_ARGUMENTS]}…"
        return f"calls {name} {shown}"
    if status == "waiting":
        question = step.get("question") or {}
        return f"waits for a person to decide about {name} {question.get('url', '')}".rstrip()
    return f"{name} {status}"


def write_to_terminal(text: str) -> None:
    """Write a part of a text on standard error at once: standard output has the result alone."""
    sys.stderr.write(text)
    sys.stderr.flush()


def is_terminal() -> bool:
    """Return whether standard error is a terminal, on which texts are printed by default."""
    return sys.stderr.isatty()


@contextmanager
def consume_in_thread(events: Iterable[RunEvent], take: Callable[[RunEvent], None]) -> Iterator[None]:
    """Call `take` in another thread for each event during the block, and for late ones up to two seconds after it.

    Nothing is raised if the stream can't be read, as at a server of an earlier version.
    """
    from pilotflame_sdk import PilotflameError

    is_left = Event()

    def follow() -> None:
        try:
            for event in events:
                if is_left.is_set():
                    return
                take(event)
        except PilotflameError:
            return

    # It may wait for an event for long when the command ends.
    thread = Thread(target=follow, name="live-text", daemon=True)
    thread.start()
    try:
        yield
        thread.join(END_SECONDS)
    finally:
        is_left.set()


@contextmanager
def print_live_texts(events: Iterable[RunEvent]) -> Iterator[None]:
    """Print the texts of models and steps of agents from these events on standard error, during the block."""
    printer = TextPrinter(write_to_terminal)
    try:
        with consume_in_thread(events, printer.take):
            yield
    finally:
        printer.close()


def _place_of(data: Mapping[str, Any]) -> Place:
    return data["nodeId"], data["iteration"]


def name_place(place: Place) -> str:
    """Return the id of a node, with its iteration in brackets if it is in a loop."""
    node_id, iteration = place
    return f"{node_id} [{iteration}]" if iteration else node_id
