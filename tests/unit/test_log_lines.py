import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import pytest

from pilotflame.log_lines import (
    HIDDEN,
    MAX_TEXT,
    MAX_WAITING_LINES,
    LogLineWriter,
    UnthreadedLineWriter,
    as_json,
    as_text,
)

ESCAPE = "\x1b[2J\r\n\x9b"


class LogColor(StrEnum):
    RED = "red"


def log_as_json(**fields: object) -> dict[str, object]:
    line = as_json(None, "info", {"event": "something happened", **fields})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    told: dict[str, object] = json.loads(line)
    return told


def log_as_text(**fields: object) -> str:
    return as_text(None, "info", {"event": "something happened", **fields}).decode()


# ── content of a line ───────────────────────────────────────────────────────────────────────────────────────


def test_a_line_begins_with_time_level_and_event() -> None:
    line = log_as_json(workflow_id="wf_1", colour=LogColor.RED, count=3, share=0.5, is_new=True, error=None)
    time = line.pop("time")
    assert isinstance(time, str)
    assert time.endswith("Z")
    assert list(line.items())[:2] == [("level", "info"), ("event", "something happened")]
    fields = {"workflow_id": "wf_1", "colour": "red", "count": 3, "share": 0.5, "is_new": True, "error": None}
    assert {**line, **fields} == line
    assert log_as_text(workflow_id="wf_1", error=None).endswith(
        " info    something happened workflow_id=wf_1\n"
    )


@pytest.mark.parametrize(
    "name", ["api_key", "X-API-Key", "secret", "password", "Authorization", "token", "cookie"]
)
def test_possible_secrets_are_hidden_at_any_depth(name: str) -> None:
    line = log_as_json(**{name: "hush"}, headers={name: "hush"}, list=[{name: "hush"}])
    assert (line[name], line["headers"], line["list"]) == (HIDDEN, {name: HIDDEN}, [{name: HIDDEN}])
    assert "hush" not in log_as_text(**{name: "hush"}, headers={name: "hush"})


def test_the_id_of_a_key_is_no_secret() -> None:
    assert log_as_json(key_id="key_1")["key_id"] == "key_1"


def test_nothing_that_is_logged_can_begin_a_line_or_reach_the_terminal() -> None:
    assert log_as_json(name=ESCAPE)["name"] == ESCAPE
    assert b"\x1b" not in as_json(None, "info", {"event": ESCAPE, ESCAPE: ESCAPE})
    line = log_as_text(name=ESCAPE)
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "value", ["x" * 1_000_000, ["x" * 1_000] * 1_000, {str(n): n for n in range(10_000)}, b"x" * 1_000_000]
)
def test_a_large_value_is_cut(value: object) -> None:
    assert len(as_json(None, "info", {"event": "large", "value": value})) < 20 * (MAX_TEXT + 100)


def test_any_value_can_be_logged() -> None:
    itself: list[object] = []
    itself.append(itself)
    values = {
        "half": "\ud800",
        "nan": float("nan"),
        "large": 2**100,
        "set": {1},
        "object": object(),
        "itself": itself,
    }
    for name, value in values.items():
        assert name in log_as_json(**{name: value})
        assert name in log_as_text(**{name: value})


def test_a_traceback_is_in_the_line_of_json_and_below_the_one_of_text() -> None:
    with pytest.raises(ValueError, match="Invalid") as raised:
        float("Invalid" + ESCAPE)
    assert str(log_as_json(exc_info=raised.value)["traceback"]).startswith("Traceback")
    first, *below = log_as_text(exc_info=raised.value).splitlines()
    assert first.endswith("something happened")
    assert "ValueError" in "".join(below)
    assert all(row.startswith("    ") and row.isprintable() for row in below)


# ── outputs ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def test_lines_are_written_in_their_order_and_all_of_them_before_the_end() -> None:
    with open_pipe() as (reader, writer):
        lines = LogLineWriter(writer, as_json)
        for number in range(2_000):
            lines.put(b"%d\n" % number)
        lines.close()
        assert os.read(reader, 1_000_000).split() == [b"%d" % number for number in range(2_000)]


def test_logging_never_waits_for_a_stuck_sink_and_counts_dropped_lines() -> None:
    sent = 2 * MAX_WAITING_LINES
    with open_pipe() as (reader, writer):
        lines = LogLineWriter(writer, as_json)
        for _ in range(sent):
            lines.put(b"a line that nobody takes, though the pipe holds some\n")
        taken = b""
        while b"log lines dropped" not in taken:
            taken += os.read(reader, 65_536)
        while not taken.endswith(b"the end\n"):
            lines.put(b"the end\n")
            taken += os.read(reader, 65_536)
        lines.close()
    told = next(json.loads(line) for line in taken.splitlines() if line.startswith(b"{"))
    assert told["level"] == "warning"
    assert told["count"] == sent - taken.count(b"a line")


def test_a_sink_that_is_gone_stops_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    lines = LogLineWriter(writer, as_json)
    lines.put(b"nobody reads this\n")
    lines.close()
    os.close(writer)


def test_a_writer_without_a_thread_writes_at_once_and_drops_lines_for_a_stuck_sink() -> None:
    with open_pipe() as (reader, writer):
        lines = UnthreadedLineWriter(writer)
        long_line = b"x" * 20_000 + b"\n"
        lines.put(long_line)
        assert os.read(reader, 1_000_000) == long_line
        for _ in range(1_000):
            lines.put(long_line)
        assert os.read(reader, 1_000_000).startswith(long_line)
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(reader, 1_000_000)
        lines.put(b"heard again\n")
        assert os.read(reader, 1_000_000) == b"heard again\n"


PROGRAM = """
import logging, sys
from pilotflame import log_lines
log_lines.configure_logging("info", log_lines.as_json)
import structlog
log = structlog.get_logger()
log.debug("not wanted")
log.info("wanted", where="here")
logging.getLogger("library").info("not wanted")
logging.getLogger("library").warning("%s happened", "something")
assert "rich" not in sys.modules
"""


def test_a_process_logs_from_its_level_up_and_libraries_their_warnings() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    ours, theirs = map(json.loads, done.stdout.splitlines())
    assert (ours["event"], ours["where"]) == ("wanted", "here")
    assert (theirs["level"], theirs["event"], theirs["logger"]) == (
        "warning",
        "something happened",
        "library",
    )
