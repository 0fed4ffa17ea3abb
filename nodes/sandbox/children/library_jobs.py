"""Execution of library nodes, one after another: the project's own code on a user's data."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from inspect import iscoroutine
from typing import TYPE_CHECKING, Any, Final, cast

from engine.node_api import NodeCall, NodeOutcome, NodeResult
from engine.services import RunCaller
from json_text import decoding
from nodes import catalog
from nodes.sandbox.children import confinement, landlock, system_calls
from nodes.sandbox.frames import LibraryJob

if TYPE_CHECKING:
    from engine.services import NodeServices
    from engine.values import Json
    from nodes.sandbox.children.child import JobReporter, PerformJob

MEMORY_BYTES: Final = 2 << 30
OPEN_FILES: Final = 16
ENCODINGS: Final = (
    *(f"iso8859_{number}" for number in (*range(1, 12), *range(13, 17))),
    *(f"cp{number}" for number in (437, *range(1250, 1259))),
    *("ascii", "idna", "koi8_r", "koi8_u", "latin_1", "mac_roman", "utf_16", "utf_32", "utf_8_sig"),
)
"""Encodings that archives and XML may name; Python loads them on use, when files are already out of reach."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
EMPTY_CALLER: Final = RunCaller("", "", "", "", "")

_decode = decoding.build_decoder(LibraryJob).decode


def load() -> PerformJob:
    """Import all node types that compute for long, and return the function that runs one on the config of a
    `LibraryJob`.
    """
    library = catalog.load_catalog()
    runs = {kind: library.implementation(kind) for kind, each in library.node_types.items() if each.cpu}
    for encoding in ENCODINGS:
        import_module(f"encodings.{encoding}")

    def perform(raw: bytes, reporter: JobReporter) -> Json | NodeResult:
        job = _decode(raw)
        call = _build_call(decoding.decode(job.config), reporter)
        outcome = _run_coroutine(runs[job.type](call))
        if call.unresolved:
            reporter.unresolved(call.unresolved)
        return cast("Json | NodeResult", outcome)

    return perform


def confine(parent: int) -> None:
    confinement.limit_process(memory_bytes=MEMORY_BYTES, open_files=OPEN_FILES)
    confinement.limit_processes(0)
    confinement.switch_user()
    confinement.give_up_rights()
    confinement.die_with_parent(parent)
    landlock.restrict_files({})
    system_calls.allow_calls(system_calls.COMPUTING_CALLS)


def _build_call(config: Mapping[str, Json], reporter: JobReporter) -> NodeCall:
    """Return a node call that has only a config and a log: nodes that run in child processes need nothing
    else of it.
    """
    return NodeCall(
        config=config,
        data=None,
        scope={},
        conditions={},
        values={},
        unresolved=[],
        log=reporter.log,
        caller=EMPTY_CALLER,
        node_id="",
        iteration="",
        idempotency_key="",
        attempt=1,
        now=EPOCH,
        services=cast("NodeServices", None),
    )


def _run_coroutine(outcome: Any) -> NodeOutcome:  # noqa: ANN401 - the outcome of a node, or a coroutine of it
    """Run a coroutine without an event loop and return its result; it may wait for nothing except its next turn. Other
    values are returned unchanged.
    """
    if not iscoroutine(outcome):
        return cast("NodeOutcome", outcome)
    while True:
        try:
            outcome.send(None)
        except StopIteration as end:
            return cast("NodeOutcome", end.value)
