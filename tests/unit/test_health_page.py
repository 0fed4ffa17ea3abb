"""Values of the page of health."""

from __future__ import annotations

import pytest

from gateway.dashboard.formats import is_moment
from gateway.dashboard.pages.health import does_cluster_fail

EARLIER, LATER = "2026-01-01T10:00:00.000Z", "2026-01-01T10:00:05.000Z"


@pytest.mark.parametrize(
    ("answered_at", "failed_at", "fails"),
    [(EARLIER, LATER, True), (LATER, EARLIER, False), (None, EARLIER, True), (EARLIER, None, False)],
)
def test_a_cluster_fails_if_its_last_request_has_failed(
    answered_at: str | None, failed_at: str | None, *, fails: bool
) -> None:
    failure = None if failed_at is None else {"at": failed_at}
    assert does_cluster_fail({"answeredAt": answered_at, "lastFailure": failure}) is fails
    assert not does_cluster_fail(None)


def test_evidence_is_shown_as_an_age_only_if_it_is_a_time() -> None:
    assert is_moment(EARLIER)
    assert not any(map(is_moment, ("0.2.0", "20260101", "exec_01T", "", 20_260_101, None)))
