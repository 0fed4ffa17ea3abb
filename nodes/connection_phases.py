"""Phases of a new connection with their times, for tests of data sources: the failed part, and the slow one.

Connections note their phases only while a test records them; otherwise a phase costs one look-up of a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from time import monotonic
from typing import Final

from msgspec import Struct


class ConnectionPhase(StrEnum):
    """Part of a connection, in the order in which they follow each other."""

    DNS = "dns"
    TCP = "tcp"
    TLS = "tls"
    AUTH = "auth"
    QUERY = "query"


class PhaseResult(Struct, frozen=True):
    """Result of a phase; a failed one is the last."""

    phase: ConnectionPhase
    is_ok: bool
    milliseconds: int


class PhaseRecorder:
    """Record of the phases of one connection."""

    def __init__(self) -> None:
        self._results: dict[ConnectionPhase, PhaseResult] = {}
        self._inner_seconds: list[float] = []
        """Seconds of the phases within each open one, the innermost last."""

    @property
    def results(self) -> list[PhaseResult]:
        """Results of the phases so far, in the order of a connection.

        Of several attempts, such as at several addresses, only the last one counts.
        """
        return [self._results[phase] for phase in ConnectionPhase if phase in self._results]

    @contextmanager
    def measure(self, phase: ConnectionPhase) -> Iterator[None]:
        """Record the block as a phase, without the time of phases within it; times of several blocks add up.

        An exception makes the phase fail, unless an inner phase has failed with it.
        """
        if phase is ConnectionPhase.TCP:
            # Another attempt: what followed the earlier connection is void.
            self._results = {key: one for key, one in self._results.items() if key is ConnectionPhase.DNS}
        began = monotonic()
        self._inner_seconds.append(0.0)
        is_ok = False
        try:
            yield
            is_ok = True
        finally:
            seconds = monotonic() - began
            own = seconds - self._inner_seconds.pop()
            if self._inner_seconds:
                self._inner_seconds[-1] += seconds
            if is_ok or all(one.is_ok for one in self._results.values()):
                earlier = self._results.get(phase)
                milliseconds = max(round(own * 1000), 0) + (earlier.milliseconds if earlier else 0)
                self._results[phase] = PhaseResult(phase, is_ok, milliseconds)


_recorder: Final[ContextVar[PhaseRecorder | None]] = ContextVar("connection_phases", default=None)


@contextmanager
def record_phases() -> Iterator[PhaseRecorder]:
    """Yield the record of the phases of all connections that the block opens, also in tasks that it starts."""
    recorder = PhaseRecorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    """Return whether phases of connections are recorded in the current context."""
    return _recorder.get() is not None


@contextmanager
def note_phase(phase: ConnectionPhase) -> Iterator[None]:
    """Record the block as a phase of a connection if `is_recording`; otherwise only run it."""
    recorder = _recorder.get()
    if recorder is None:
        yield
    else:
        with recorder.measure(phase):
            yield
