"""Log lines as JSON for machines or as text for a terminal; configured once, when a process starts.

Logging never blocks: lines go through a bounded queue to a thread that writes them. Lines for a full queue are dropped
and counted, and the count is logged once the queue has capacity again.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

import msgspec


@contextmanager
def _block_import(module: str) -> Iterator[None]:
    """Make a module impossible to import during the block, unless it is already loaded or blocked."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # None marks a blocked module in the import system
    try:
        yield
    finally:
        del sys.modules[module]


# structlog loads rich if it is installed, for tracebacks that are never rendered here: 5 MB and a tenth of a second.
with _block_import("rich"):
    import structlog

from telemetry import log_context  # noqa: E402 - after the block above, so that structlog always loads without rich

STANDARD_OUTPUT: Final = 1
MAX_WAITING_LINES: Final = 10_000
MAX_LINES_PER_WRITE: Final = 500
WRITE_EVERY_SECONDS: Final = 0.01
"""Lines within this time are written together, so the thread wakes a hundred times a second at most."""
FLUSH_SECONDS: Final = 2.0
"""Seconds that the exit of a process waits for a blocked sink."""
MAX_TEXT: Final = 2_000
MAX_ITEMS: Final = 20
MAX_DEPTH: Final = 2
MAX_TRACEBACK: Final = 16_000
HIDDEN: Final = "[hidden]"
_SECRET_WORDS: Final = ("key", "secret", "password", "authorization", "token", "cookie")

Fields = MutableMapping[str, Any]


class LineRenderer(Protocol):
    """Renderer of an event as a line; the only processor of structlog."""

    def __call__(self, logger: object, level: str, fields: Fields, /) -> bytes: ...


class LineWriter(Protocol):
    """Writer of log lines, which never blocks its caller."""

    def put(self, line: bytes) -> None:
        """Write a line, now or soon, or drop it while the reader takes none."""

    def close(self) -> None:
        """Write the lines that wait, as far as the reader takes them."""


# ── rendering ─────────────────────────────────────────────────────────────────────────────────────


def as_json(_logger: object, level: str, fields: Fields, /) -> bytes:
    """Render an event as one line with a JSON object: `time`, `level`, `event`, and then its fields.

    Values of fields with names such as `password` are hidden, long values truncated.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now[:-6] + "Z", "level": level, "event": _truncate_value(fields.pop("event", None))}
    _add_fields(line, fields)
    try:
        return msgspec.json.encode(line) + b"\n"
    except ValueError:
        return json.dumps(line).encode() + b"\n"  # `json` is slower, and can encode half a surrogate pair.


def as_text(_logger: object, level: str, fields: Fields, /) -> bytes:
    """Render an event as one line of text, with its traceback below it if there is one.

    Values of fields with names such as `password` are hidden, long values truncated, control characters
    escaped.
    """
    line: dict[str, Any] = {}
    event = _escape_value(_truncate_value(fields.pop("event", None)))
    _add_fields(line, fields)
    trace = line.pop("traceback", "")
    said = "".join(f" {name}={_escape_value(value)}" for name, value in line.items() if value is not None)
    below = "".join(f"\n    {_escape_value(row)}" for row in trace.splitlines())
    now = datetime.now().astimezone()
    return f"{now:%H:%M:%S} {level:<7} {event}{said}{below}\n".encode(errors="replace")


def _add_fields(line: dict[str, Any], fields: Fields) -> None:
    """Add the fields of an event, those of the log context, and its traceback to a line; secret ones are hidden."""
    exc_info = fields.pop("exc_info", None)
    for name, value in fields.items():
        line[name] = HIDDEN if _is_secret(name) else _truncate_value(value)
    for name, context_value in log_context.fields.get(log_context.EMPTY).items():
        line.setdefault(name, context_value)
    if exc_info:
        line["traceback"] = _format_traceback(exc_info)


@lru_cache(maxsize=1_000)
def _is_secret(name: str) -> bool:
    """Return whether a field of this name may contain a secret, by words such as `token`; names that end in
    `_id` don't.
    """
    lowered = name.lower()
    return any(word in lowered for word in _SECRET_WORDS) and not lowered.endswith("_id")


def _truncate_value(value: object, depth: int = 0) -> object:
    """Return a value for a log line: texts up to 2,000 characters, containers up to 20 items and two levels.

    Other objects, and containers in deeper levels, are shown as their `repr`.
    """
    if isinstance(value, str):
        # `str()` converts a member of an enum to plain text.
        return str(value) if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "…"
    if value is None or isinstance(value, int | float):
        return value
    if depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            return _truncate_mapping(value, depth + 1)
        if isinstance(value, list | tuple | set | frozenset):
            return [_truncate_value(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return _truncate_value(repr(value), depth)


def _truncate_mapping(value: Mapping[Any, Any], depth: int) -> dict[str, object]:
    """Return the first 20 items of a mapping for a log line, values of secret names hidden."""
    shown: dict[str, object] = {}
    for key, item in list(value.items())[:MAX_ITEMS]:
        name = str(key)[:MAX_TEXT]
        shown[name] = HIDDEN if _is_secret(name) else _truncate_value(item, depth)
    return shown


def _escape_value(value: object) -> str:
    """Return a value as text, with control characters escaped."""
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def _format_traceback(exc_info: object) -> str:
    """Return the traceback of an exception, or for another truthy value of the current one;
    of a long one the last 16,000 characters.
    """
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    error = exc_info if isinstance(exc_info, BaseException) else sys.exc_info()[1]
    return "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


class LogLineWriter:
    """Non-blocking writer of lines from any thread; writes them in its own thread."""

    def __init__(self, descriptor: int, render: LineRenderer) -> None:
        self._descriptor = descriptor
        self._render = render
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._dropping = threading.Lock()
        self._dropped = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._write_all, name="log-lines", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Enqueue a line for writing; if 10,000 lines wait, it is dropped and counted."""
        if self._waiting.qsize() < MAX_WAITING_LINES:
            self._waiting.put(line)
            return
        with self._dropping:
            self._dropped += 1

    # structlog calls the method that is named for the level.
    debug = info = warning = error = critical = put

    def close(self) -> None:
        """Write the queued lines, as far as the descriptor accepts them within two seconds, and end the thread."""
        self._is_closing = True
        self._waiting.put(None)
        self._thread.join(FLUSH_SECONDS)

    def _write_all(self) -> None:
        """Write queued lines, up to 500 at once, until `close`; a line about dropped ones follows each write.

        Runs in the thread.
        """
        while (first := self._waiting.get()) is not None:
            if not self._is_closing:
                time.sleep(WRITE_EVERY_SECONDS)
            lines, is_last = self._take_batch(first)
            self._write(b"".join(lines) + self._render_dropped_count())
            if is_last:
                return

    def _take_batch(self, first: bytes) -> tuple[list[bytes], bool]:
        """Return the first line and those that wait behind it, up to 500, without waiting,
        and whether `close` was among them.
        """
        lines = [first]
        while len(lines) < MAX_LINES_PER_WRITE:
            try:
                line = self._waiting.get_nowait()
            except Empty:
                break
            if line is None:
                return lines, True
            lines.append(line)
        return lines, False

    def _render_dropped_count(self) -> bytes:
        """Return a log line with the number of lines dropped since the last call; empty if there are none."""
        with self._dropping:
            dropped, self._dropped = self._dropped, 0
        if not dropped:
            return b""
        return self._render(self, "warning", {"event": "log lines dropped", "count": dropped})

    def _write(self, text: bytes) -> None:
        """Write all of a text, waiting while the descriptor is full; drop the rest once the reader has closed it."""
        # Written to the descriptor itself: Python's buffered streams have locks that can block the exit of a process.
        while text:
            try:
                text = text[os.write(self._descriptor, text) :]
            except BlockingIOError:
                time.sleep(WRITE_EVERY_SECONDS)
            except OSError:
                return  # The reader has closed its end, which is no reason to stop the process.


class UnthreadedLineWriter:
    """Writer for a process that forks, and therefore has no thread: a line that would block is dropped."""

    def __init__(self, descriptor: int = STANDARD_OUTPUT) -> None:
        self._descriptor = descriptor

    def put(self, line: bytes) -> None:
        """Write a line at once, without waiting.

        The rest that the descriptor doesn't accept now is dropped, also in the middle of the line; a closed reader is
        no error.
        """
        waiter = select.poll()
        waiter.register(self._descriptor, select.POLLOUT)
        # A pipe that is writable has room for `PIPE_BUF` bytes, and takes more only by waiting for its reader.
        while line and waiter.poll(0):
            try:
                line = line[os.write(self._descriptor, line[: select.PIPE_BUF]) :]
            except OSError:
                return

    # structlog calls the method that is named for the level.
    debug = info = warning = error = critical = put

    def close(self) -> None:
        """Do nothing: no line waits."""


class _LoggingHandler(logging.Handler):
    """Handler for records that libraries log through Python's own logging."""

    def __init__(self, lines: LineWriter, render: LineRenderer) -> None:
        super().__init__()
        self._lines = lines
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record of Python's logging as a line."""
        try:
            text, trace = record.getMessage(), record.exc_info
            fields: Fields = {"event": text, "logger": record.name, "exc_info": trace}
            self._lines.put(self._render(self, record.levelname.lower(), fields))
        except Exception:  # noqa: BLE001 - an invalid log call of a library must not fail its caller
            self.handleError(record)


def configure_logging(level: str, render: LineRenderer, lines: LineWriter | None = None) -> LineWriter:
    """Send all logging to a writer, by default a `LogLineWriter` to standard output, and return the writer.

    The project's own logs are sent from `level` up, warnings of libraries always. Loggers are created at
    first use and filtered then: calls below the level cost next to nothing. The writer is closed at the exit of the
    process.
    """
    writer = lines or LogLineWriter(STANDARD_OUTPUT, render)
    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_LoggingHandler(writer, render)], level=logging.WARNING, force=True)
    atexit.register(writer.close)
    return writer
