"""Activity of this process that its reports of presence carry: always counted, also without metrics.

The numbers are plain and without locks: one thread alone changes each of them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec import Struct, field

DATABASE: Final = "database"
BROKER: Final = "broker"
KUBERNETES: Final = "kubernetes"
LOCAL_PODS: Final = "local-pods"
"""Names of the connections of a process."""
CLUSTER_CONNECTIONS: Final = {"kubernetes": KUBERNETES, "local": LOCAL_PODS}
"""Names of the connections to clusters, by the setting `cluster`."""


class DutyTick(Struct, frozen=True):
    """Last tick of a periodic duty."""

    every_seconds: float
    seconds: float
    """Time that it took."""
    ended_at: float
    """End, by the monotonic clock of the process."""


class ServerAnswer(Struct, frozen=True):
    """Answer of a server."""

    at: float
    """Its time, by the monotonic clock of the process."""
    seconds: float
    """Time that it took."""


class ConnectionActivity(Struct):
    """Last answer and last failure of a server that the process uses."""

    answer: ServerAnswer | None = None
    """None before the first one."""
    failed_at: float | None = None
    """By the monotonic clock of the process; None before the first failure."""
    failure: str = ""
    """Last failure as text without credentials."""

    def show(self, now: float) -> dict[str, Any]:
        """Return `ms` and `age` of the last answer, `failure` and `failureAge` of the last failure,
        without those that are none.

        `now` is by the monotonic clock; ages are in seconds.
        """
        shown: dict[str, Any] = {}
        if self.answer is not None:
            shown |= {"ms": round(self.answer.seconds * 1_000, 2), "age": round(now - self.answer.at, 1)}
        if self.failed_at is not None:
            shown |= {"failure": self.failure, "failureAge": round(now - self.failed_at, 1)}
        return shown


class Lead(Struct, frozen=True):
    """Time for which this process has been the leading scheduler."""

    owner: str
    """Name in the lease."""
    since: float
    """Begin, by the monotonic clock of the process."""


class ProcessActivity(Struct, eq=False):
    """Activity of one process since its start, for its reports: counts, duties, and answers of its servers."""

    claims: int = 0
    """Claimed executions."""
    commits: int = 0
    """Transactions with records of executions."""
    committed_runs: int = 0
    """Executions with records in these transactions, counted once for each."""
    count_streams: Callable[[], int] | None = None
    """Returns the number of open event streams; None in processes without any."""
    retention: Mapping[str, int] = field(default_factory=dict)
    """Retention by name, in days; empty unless the process deletes old rows."""
    duties: dict[str, DutyTick] = field(default_factory=dict)
    """Last ticks of periodic duties by name; empty in processes other than the leading scheduler."""
    queues: dict[str, Callable[[], int] | None] = field(default_factory=dict)
    """Queues from which the process takes work, by name: a function counts a queue of its own, None is a shared one."""
    renewed_at: float | None = None
    """Last renewal of its leases of runs, or of its lead, by the monotonic clock."""
    lead: Lead | None = None
    """None in processes other than the leading scheduler."""
    connections: defaultdict[str, ConnectionActivity] = field(
        default_factory=lambda: defaultdict(ConnectionActivity)
    )
    """Servers that the process uses, by name."""

    def note_failure(self, connection: str, error: BaseException) -> None:
        """Record that a server failed now; the text of the error is stripped of credentials."""
        from telemetry.failure_texts import describe_failure  # noqa: PLC0415 - loaded with the first failure

        noted = self.connections[connection]
        noted.failed_at, noted.failure = time.monotonic(), describe_failure(error)


ACTIVITY: Final = ProcessActivity()
"""Activity of this process."""


class ActivityMeter:
    """Meter of the activity between two reports of a process."""

    def __init__(self, activity: ProcessActivity = ACTIVITY) -> None:
        self._activity = activity
        self._at = time.monotonic()
        self._claims, self._commits, self._committed_runs = 0, 0, 0

    def take(self) -> dict[str, Any]:
        """Return the activity since the last call as JSON: `claims` and `commits` per second, `commitSize` as the mean
        number of executions in a commit, `streams` (open event streams), `retention` in days by name, `duties` with
        `every`, `seconds` and `age` of their last ticks, `queues` with their lengths (None if unknown), `renewalAge`,
        `lead` with its `owner` and `age`, and `connections` as `ConnectionActivity.show` returns them; without those
        that do not apply. Times and ages are in seconds.
        """
        now, activity = time.monotonic(), self._activity
        seconds = max(now - self._at, 0.001)
        claims = activity.claims - self._claims
        commits = activity.commits - self._commits
        committed = activity.committed_runs - self._committed_runs
        self._at = now
        self._claims, self._commits = activity.claims, activity.commits
        self._committed_runs = activity.committed_runs
        shown: dict[str, Any] = {
            "claims": round(claims / seconds, 1),
            "commits": round(commits / seconds, 1),
        }
        if commits:
            shown["commitSize"] = round(committed / commits, 1)
        if activity.count_streams is not None:
            shown["streams"] = activity.count_streams()
        if activity.retention:
            shown["retention"] = dict(activity.retention)
        if activity.duties:
            shown["duties"] = {
                name: {
                    "every": tick.every_seconds,
                    "seconds": round(tick.seconds, 3),
                    "age": round(now - tick.ended_at, 1),
                }
                for name, tick in activity.duties.items()
            }
        if activity.queues:
            shown["queues"] = {name: count and count() for name, count in activity.queues.items()}
        if activity.renewed_at is not None:
            shown["renewalAge"] = round(now - activity.renewed_at, 1)
        if activity.lead is not None:
            shown["lead"] = {"owner": activity.lead.owner, "age": round(now - activity.lead.since, 1)}
        if activity.connections:
            shown["connections"] = {name: one.show(now) for name, one in activity.connections.items()}
        return shown
