"""Texts of models that commands print while they come."""

from __future__ import annotations

from io import StringIO
from typing import Any

from pilotflame_sdk import RunEvent
from rich.console import Console

from pilotflame.live_text import TextPrinter
from pilotflame.live_view import RunView

PLACE = {"nodeId": "agent", "iteration": "", "number": 0, "attempt": 1}


def render(*events: tuple[str, dict[str, Any]]) -> str:
    """Return all that is printed about events, whose data are completed by those of a place."""
    written: list[str] = []
    printer = TextPrinter(written.append)
    for name, data in events:
        printer.take(RunEvent(name, "", {**PLACE, **data}))
    printer.close()
    return "".join(written)


def token(offset: int, text: str, **data: object) -> tuple[str, dict[str, Any]]:
    return "token", {"offset": offset, "text": text, **data}


def test_a_new_connection_repeats_no_text_and_a_recorded_answer_completes_it() -> None:
    answer = {"kind": "model", "status": "completed", "result": {"text": "It is cold."}}
    assert (
        render(token(0, "It "), token(0, "It is "), token(6, "co"), ("step", answer))
        == "agent:\nIt is cold.\n"
    )


def test_a_text_that_begins_again_says_so() -> None:
    lost = ("retry", {"reason": "worker-lost"})
    again = "agent:\nIt\nagent: begins again, since its worker was lost\nagent:\nSo\n"
    assert render(token(0, "It"), lost, token(0, "So", attempt=2)) == again
    # The event was lost with a connection.
    assert render(token(0, "It"), token(0, "So", attempt=2)) == again.replace(
        ", since its worker was lost", ""
    )


def test_tools_have_lines_and_texts_of_two_nodes_are_told_apart() -> None:
    call = {"kind": "tool", "name": "search", "arguments": {"city": "Oslo"}, "number": 1}
    waiting = {**call, "status": "waiting", "question": {"url": "https://example.com/q"}}
    printed = render(
        token(0, "Looks."),
        ("step", {**call, "status": "started"}),
        token(0, "\x1b[2J", nodeId="other"),
        ("step", waiting),
    )
    assert printed.splitlines() == [
        *("agent:", "Looks.", 'agent: calls search {"city": "Oslo"}', "other:", "\\u001b[2J"),
        "agent: waits for a person to decide about search https://example.com/q",
    ]


def test_a_view_has_the_end_of_a_text_below_its_table_until_the_node_has_ended() -> None:
    view = RunView("Weather")

    def show() -> str:
        shown = StringIO()
        Console(file=shown, width=80).print(view)
        return shown.getvalue()

    def span(status: str) -> RunEvent:
        own = {"kind": "node", "nodeLabel": "", "nodeType": "agent", "status": status, "durationMs": None}
        return RunEvent("span", "1", {**PLACE, **own})

    view.take(span("running"))
    for name, data in (token(0, "x" * 400), token(400, " It is cold.")):
        view.take_step(RunEvent(name, "", {**PLACE, **data}))
    assert "It is cold." in show()
    assert show().count("x") < 400
    view.take_step(RunEvent("retry", "", {**PLACE, "reason": "worker-lost"}))
    assert "begins again, since its worker was lost" in show()
    assert "cold" not in show()
    view.take(span("completed"))
    assert "begins again" not in show()
