"""Log lines: JSON for machines, plain text for a person at a terminal; set up once, when a process starts.

Whoever logs never waits for what takes the lines: they go through a bounded queue to a thread that writes them. What
finds the queue full is dropped and counted, and the count is logged once there is room again.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
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
def _absent(module: str) -> Iterator[None]:
    """Make a module impossible to import, unless somebody has done so already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # the import system's own sign for it
    try:
        yield
    finally:
        del sys.modules[module]


# structlog loads rich wherever it is installed, for tracebacks that are never drawn here: 5 MB and a tenth of a second.
with _absent("rich"):
    import structlog

MAX_WAITING_LINES: Final = 10_000
MAX_LINES_PER_WRITE: Final = 500
WRITE_EVERY_SECONDS: Final = 0.01
"""Lines that come within this time are written together: the thread is woken a hundred times a second at most."""
FLUSH_SECONDS: Final = 2.0
"""How long the end of the process waits for a sink that takes nothing."""
MAX_TEXT: Final = 2_000
MAX_ITEMS: Final = 20
MAX_DEPTH: Final = 2
MAX_TRACEBACK: Final = 16_000
HIDDEN: Final = "[hidden]"
_SECRET_WORDS: Final = ("key", "secret", "password", "authorization", "token", "cookie")

Fields = MutableMapping[str, Any]


class LineRenderer(Protocol):
    """Turns an event into a line; a processor of structlog's, and the only one."""

    def __call__(self, logger: object, level: str, fields: Fields, /) -> bytes: ...


# ── what a line says ──────────────────────────────────────────────────────────────────────────────


def as_json(_logger: object, level: str, fields: Fields, /) -> bytes:
    """Return an event as one JSON object: `time`, `level`, `event`, and then its fields."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now[:-6] + "Z", "level": level, "event": _bounded(fields.pop("event", None))}
    _add_fields(line, fields)
    try:
        return msgspec.json.encode(line) + b"\n"
    except ValueError:
        return json.dumps(line).encode() + b"\n"  # slower, and able to write half a surrogate pair


def as_text(_logger: object, level: str, fields: Fields, /) -> bytes:
    """Return an event as people read it, on one line unless there is a traceback."""
    line: dict[str, Any] = {}
    event = _visible(_bounded(fields.pop("event", None)))
    _add_fields(line, fields)
    trace = line.pop("traceback", "")
    said = "".join(f" {name}={_visible(value)}" for name, value in line.items() if value is not None)
    below = "".join(f"\n    {_visible(row)}" for row in trace.splitlines())
    now = datetime.now().astimezone()
    return f"{now:%H:%M:%S} {level:<7} {event}{said}{below}\n".encode(errors="replace")


def _add_fields(line: dict[str, Any], fields: Fields) -> None:
    exc_info = fields.pop("exc_info", None)
    for name, value in fields.items():
        line[name] = HIDDEN if _is_secret(name) else _bounded(value)
    if exc_info:
        line["traceback"] = _traceback(exc_info)


@lru_cache(maxsize=1_000)
def _is_secret(name: str) -> bool:
    """Tell whether a field of this name may hold a secret; an id tells only which one it is."""
    lowered = name.lower()
    return any(word in lowered for word in _SECRET_WORDS) and not lowered.endswith("_id")


def _bounded(value: object, depth: int = 0) -> object:
    """Return what a line may hold of a value."""
    if isinstance(value, str):
        # `str()` makes a plain text of an enum's member.
        return str(value) if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "…"
    if value is None or isinstance(value, int | float):
        return value
    if depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            return _bounded_mapping(value, depth + 1)
        if isinstance(value, list | tuple | set | frozenset):
            return [_bounded(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return _bounded(repr(value), depth)


def _bounded_mapping(value: Mapping[Any, Any], depth: int) -> dict[str, object]:
    shown: dict[str, object] = {}
    for key, item in list(value.items())[:MAX_ITEMS]:
        name = str(key)[:MAX_TEXT]
        shown[name] = HIDDEN if _is_secret(name) else _bounded(item, depth)
    return shown


def _visible(value: object) -> str:
    """Return a value without what a terminal would act on."""
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def _traceback(exc_info: object) -> str:
    """Return the traceback of what was raised; of a long one the end, where the reason stands."""
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    error = exc_info if isinstance(exc_info, BaseException) else sys.exc_info()[1]
    return "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]


# ── where lines go ────────────────────────────────────────────────────────────────────────────────


class LogLineWriter:
    """Takes lines from any thread without ever blocking it, and writes them from a thread of its own."""

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
        """Have a line written, unless too many are waiting."""
        if self._waiting.qsize() < MAX_WAITING_LINES:
            self._waiting.put(line)
            return
        with self._dropping:
            self._dropped += 1

    # structlog calls the method that is named for the level.
    debug = info = warning = error = critical = put

    def close(self) -> None:
        """Write what is waiting, as far as the sink takes it within a moment."""
        self._is_closing = True
        self._waiting.put(None)
        self._thread.join(FLUSH_SECONDS)

    def _write_all(self) -> None:
        while (first := self._waiting.get()) is not None:
            if not self._is_closing:
                time.sleep(WRITE_EVERY_SECONDS)
            lines, is_last = self._more_after(first)
            self._write(b"".join(lines) + self._about_dropped())
            if is_last:
                return

    def _more_after(self, first: bytes) -> tuple[list[bytes], bool]:
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

    def _about_dropped(self) -> bytes:
        with self._dropping:
            dropped, self._dropped = self._dropped, 0
        if not dropped:
            return b""
        return self._render(self, "warning", {"event": "log lines dropped", "count": dropped})

    def _write(self, text: bytes) -> None:
        # Straight to the descriptor: Python's buffered streams have locks, in which the end of a process can get stuck.
        while text:
            try:
                text = text[os.write(self._descriptor, text) :]
            except BlockingIOError:
                time.sleep(WRITE_EVERY_SECONDS)
            except OSError:
                return  # nobody reads any more, which is no reason to stop working


class _LoggingHandler(logging.Handler):
    """Writes what libraries say through Python's own logging."""

    def __init__(self, lines: LogLineWriter, render: LineRenderer) -> None:
        super().__init__()
        self._lines = lines
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, trace = record.getMessage(), record.exc_info
            fields: Fields = {"event": text, "logger": record.name, "exc_info": trace}
            self._lines.put(self._render(self, record.levelname.lower(), fields))
        except Exception:  # noqa: BLE001 - a library's bad log call must not end what it was doing
            self.handleError(record)


def configure_logging(level: str, render: LineRenderer, *, descriptor: int = 1) -> LogLineWriter:
    """Send all logging to `descriptor` from now on: our own from `level` up, and warnings of libraries.

    Loggers are made when they are first used, and filtered then: what is below the level costs next to nothing.
    """
    lines = LogLineWriter(descriptor, render)
    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_LoggingHandler(lines, render)], level=logging.WARNING, force=True)
    atexit.register(lines.close)
    return lines
