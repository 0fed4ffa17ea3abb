"""Phases of connections: nested ones, the one that has failed, and further attempts."""

from __future__ import annotations

import pytest

from nodes.connection_phases import ConnectionPhase, PhaseRecorder, is_recording, note_phase, record_phases

DNS, TCP, TLS, AUTH, QUERY = ConnectionPhase


def list_phases(recorder: PhaseRecorder) -> list[tuple[ConnectionPhase, bool]]:
    assert all(one.milliseconds >= 0 for one in recorder.results)
    return [(one.phase, one.is_ok) for one in recorder.results]


def connect(*, fails_in: ConnectionPhase | None = None) -> None:
    """Begin phases as a driver does: connection and TLS within the login, and all within the query."""

    def pass_through(phase: ConnectionPhase) -> None:
        if phase is fails_in:
            raise ConnectionError

    with note_phase(QUERY):
        with note_phase(DNS):
            pass_through(DNS)
        with note_phase(AUTH):
            for phase in (TCP, TLS):
                with note_phase(phase):
                    pass_through(phase)
            pass_through(AUTH)
        pass_through(QUERY)


def test_phases_within_others_are_recorded_in_the_order_of_a_connection() -> None:
    with record_phases() as recorder:
        connect()
    assert list_phases(recorder) == [(phase, True) for phase in ConnectionPhase]


@pytest.mark.parametrize("phase", ConnectionPhase)
def test_only_the_innermost_phase_has_failed_and_is_the_last(phase: ConnectionPhase) -> None:
    with record_phases() as recorder, pytest.raises(ConnectionError):
        connect(fails_in=phase)
    begun = list(ConnectionPhase)[: list(ConnectionPhase).index(phase)]
    assert list_phases(recorder) == [*((one, True) for one in begun), (phase, False)]


def test_another_attempt_replaces_the_phases_of_the_earlier_connection() -> None:
    with record_phases() as recorder:
        with note_phase(DNS):
            pass
        for fails in (TLS, None):
            with note_phase(TCP):
                pass
            if fails:
                with pytest.raises(ConnectionError), note_phase(TLS):
                    raise ConnectionError
        with note_phase(AUTH):
            pass
    assert list_phases(recorder) == [(DNS, True), (TCP, True), (AUTH, True)]


def test_nothing_is_recorded_outside_of_a_test() -> None:
    assert not is_recording()
    with record_phases() as recorder:
        assert is_recording()
    connect()
    assert recorder.results == []
