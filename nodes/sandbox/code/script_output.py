"""Result, printed lines and errors of a script, in the form in which they leave the child process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from engine.run_errors import NodeError

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sandbox.children.child import JobReporter

MAX_LINES: Final = 1_000
MAX_LINE_CHARACTERS: Final = 8_192
MAX_PRINTED_CHARACTERS: Final = 1_000_000
MAX_MESSAGE_CHARACTERS: Final = 2_000
LOG_LEVELS: Final = {"stdout": "info", "stderr": "warning"}


class PrintedLines:
    """Splits printed text into lines of the log, up to the limits."""

    def __init__(self, reporter: JobReporter) -> None:
        self._reporter = reporter
        self._begun = dict.fromkeys(LOG_LEVELS, "")
        """Unterminated line of each stream."""
        self._lines = 0
        self._gave_up = False
        self._characters = 0

    def write(self, stream: str, text: str) -> None:
        """Log the lines that end in `text`, printed to a stream of `LOG_LEVELS`; the rest is kept for its line end.

        Output beyond a million characters or 1,000 lines is left out.
        """
        remaining = MAX_PRINTED_CHARACTERS - self._characters
        self._characters += len(text)
        *lines, begun = (self._begun[stream] + text[:remaining]).split("\n")
        for line in lines:
            self._line(stream, line)
        self._begun[stream] = begun
        if len(text) > remaining:
            self._give_up()

    def end(self) -> None:
        """Log the unterminated line of each stream; the script has ended."""
        for stream, begun in self._begun.items():
            if begun:
                self._line(stream, begun)

    def _line(self, stream: str, line: str) -> None:
        if self._lines == MAX_LINES:
            self._give_up()
        if self._gave_up:
            return
        self._lines += 1
        self._reporter.log(LOG_LEVELS[stream], line[:MAX_LINE_CHARACTERS])

    def _give_up(self) -> None:
        """Log once that further output is left out."""
        if not self._gave_up:
            self._gave_up = True
            self._reporter.log("warning", "The code printed too much: the rest is left out")


def encode_result(value: object) -> Json:
    """Convert the result of a script to JSON; raises `NodeError` for a result that can't be converted.

    Tuples and sets become lists, dates and times texts in ISO 8601, decimals and UUIDs texts, and bytes base64; keys
    become texts.
    """
    try:
        return _tuples_to_lists(msgspec.to_builtins(value, str_keys=True))
    except RecursionError as error:
        message = "The result contains itself, or is nested too deeply"
        raise NodeError(message, code="too-deep") from error
    except (TypeError, ValueError) as error:
        message = f"The result can't be written as JSON: {str(error)[:MAX_MESSAGE_CHARACTERS]}"
        raise NodeError(message, code="not-json") from error


def _tuples_to_lists(value: Json | tuple[Json, ...]) -> Json:
    match value:
        case dict():
            return {key: _tuples_to_lists(item) for key, item in value.items()}
        case list() | tuple():
            return [_tuples_to_lists(item) for item in value]
        case _:
            return value


def code_error(kind: str, message: str, line: int | None) -> NodeError:
    """Return the error for an exception of a script, or for invalid syntax: type, message (cut to 2,000
    characters) and line.
    """
    place = "" if line is None else f" (line {line})"
    shown = f"{kind}: {message}" if message else kind
    return NodeError(f"{shown[:MAX_MESSAGE_CHARACTERS]}{place}", code="code-error")


def script_timeout(seconds: float) -> NodeError:
    return NodeError(f"The time limit of {seconds:g} s was exceeded", code="timeout")


def script_out_of_memory(max_bytes: int) -> NodeError:
    message = f"The memory limit of {max_bytes // 2**20:,} MB was exceeded"
    return NodeError(message, code="out-of-memory")
