"""Timetables of schedules: pure rules for due instants, and for the instants that are run after a delay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from hashlib import blake2b, sha256
from itertools import islice, takewhile
from typing import Annotated, Any, Final
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim, CronSimError
from msgspec import Struct

from models import weekly_windows

GRACE_TIME: Final = timedelta(minutes=1)
"""Lateness above which an instant counts as missed."""
MISFIRE_LIMIT: Final = 10
"""Default number of missed instants that are run."""
MAX_WAITING: Final = 1_000
"""Number of unstarted runs of its workflow at which a schedule skips instants."""
MAX_AHEAD: Final = timedelta(hours=1)
"""Largest step of a clock that was ahead for which no instant is run twice."""
CRON_FIELDS: Final = 5
CRON_CHARACTERS: Final = 200
_FIRST_STRETCH: Final = timedelta(hours=1)
_STRETCHED: Final = 8
_MICROSECOND: Final = timedelta(microseconds=1)
_SOME_MOMENT: Final = datetime(2024, 1, 1, tzinfo=UTC)


class InvalidTimetable(ValueError):
    """The config of a schedule is unusable; the text says why.

    `field` is the name of the wrong one.
    """

    def __init__(self, text: str, field: str = "cron") -> None:
        super().__init__(text)
        self.field = field


class MisfirePolicy(StrEnum):
    """Policy for missed instants."""

    SKIP = "skip"
    RUN_ONCE = "run-once"
    """One run for all due instants, at the last of them."""
    RUN_ALL = "run-all"
    """Runs for the last due instants, up to the limit."""


class OverlapPolicy(StrEnum):
    """Policy for an instant during an earlier run."""

    ALLOW = "allow"
    SKIP = "skip"
    QUEUE = "queue"


class SkipReason(StrEnum):
    """Reason for a skipped instant."""

    MISSED = "missed"
    """It was missed, and the misfire policy leaves it out."""
    OVERLAP = "overlap"
    """An earlier run was in progress."""
    QUEUE_FULL = "queue-full"
    """Too many runs of the workflow had not started."""
    CONCURRENCY_LIMIT = "concurrency-limit"
    """The concurrency limit of the workflow was reached, and its settings refuse further runs."""
    PAUSED = "paused"
    """The workflow was paused."""


class ScheduleTimetable(Struct, frozen=True, dict=True):
    """Parsed config of a schedule."""

    cron: str | None
    interval_seconds: int | None
    """Interval; exactly one of `cron` and this is not None."""
    timezone: str
    misfire: MisfirePolicy
    misfire_limit: int
    overlap: OverlapPolicy
    jitter_seconds: int

    @cached_property
    def zone(self) -> ZoneInfo:
        """Time zone of the schedule."""
        return ZoneInfo(self.timezone)

    @property
    def timing_hash(self) -> str:
        """Hash of cron, interval, time zone and jitter, which determine the instants; equal ones have the
        same instants.
        """
        timing = (self.cron, self.interval_seconds, self.timezone, self.jitter_seconds)
        return sha256(msgspec.json.encode(timing)).hexdigest()

    def start_delay(self, workflow_id: str) -> timedelta:
        """Return the delay of all runs of a workflow after their instants: constant, at least 0, and less than the
        jitter.
        """
        digest = blake2b(workflow_id.encode(), digest_size=4).digest()
        return timedelta(
            milliseconds=self.jitter_seconds * 1_000 * int.from_bytes(digest, "big") // 256 ** len(digest)
        )

    def first_after(self, moment: datetime, anchor: datetime) -> datetime | None:
        """Return the first instant after a time, in UTC; None if there is none.

        Intervals count from `anchor`.
        """
        return next(self.instants_after(moment, anchor), None)

    def instants_after(self, moment: datetime, anchor: datetime) -> Iterator[datetime]:
        """Yield all instants after a time, in UTC, possibly without end.

        Intervals count from `anchor`.
        """
        if self.interval_seconds is not None:
            yield from _interval_instants(timedelta(seconds=self.interval_seconds), moment, anchor)
            return
        for local in CronSim(self.cron or "", moment.astimezone(self.zone)):
            instant = local.astimezone(UTC)
            # In an hour that the clocks repeat, the iterator begins with the first of the two.
            if instant > moment:
                yield instant

    def instants_between(self, first: datetime, last: datetime, anchor: datetime) -> list[datetime]:
        """Return the instants from `first` to `last`, both included, in UTC; intervals count from `anchor`."""
        return [
            *takewhile(lambda instant: instant <= last, self.instants_after(first - _MICROSECOND, anchor))
        ]

    def last_instants(self, count: int, first: datetime, last: datetime, anchor: datetime) -> list[datetime]:
        """Return the last instants from `first` to `last`, both included, at most `count`, earliest first.

        Intervals count from `anchor`. It doesn't compute all instants of a long time.
        """
        stretch = _FIRST_STRETCH
        while True:
            start = max(first, last - stretch)
            found = self.instants_between(start, last, anchor)
            if len(found) >= count or start == first:
                return found[-count:]
            stretch *= _STRETCHED


class _TimetableConfig(msgspec.Struct, rename="camel"):
    """Config that the node type allows, with its defaults."""

    cron: str | None = None
    interval_seconds: Annotated[int, msgspec.Meta(ge=1, le=31_536_000)] | None = None
    timezone: str = "UTC"
    misfire: MisfirePolicy = MisfirePolicy.RUN_ONCE
    misfire_limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = MISFIRE_LIMIT
    overlap: OverlapPolicy = OverlapPolicy.ALLOW
    jitter_seconds: Annotated[int, msgspec.Meta(ge=0, le=3_600)] = 0


class ScheduleState(Struct, frozen=True):
    """State of a schedule on which decisions depend."""

    workflow_id: str
    anchor_at: datetime
    next_run_at: datetime
    """First instant without a decision."""
    is_busy: bool = False
    """Whether its last run is in progress."""
    waiting_runs: int = 0
    """Number of unstarted runs of its workflow."""


class ScheduleDecision(Struct, frozen=True):
    """Decision about all due instants."""

    run: Sequence[datetime]
    """Instants to run, in order."""
    next_run_at: datetime | None
    passed: SkipReason | None = None
    """Reason for skipped instants; None if none was skipped."""
    skipped_at: datetime | None = None
    """Last skipped instant."""


def parse_timetable(config: Mapping[str, Any]) -> ScheduleTimetable:
    """Parse the stored config of a schedule trigger, which need not be valid.

    A cron expression wins over an interval. Raises `InvalidTimetable` for a config that can't be followed, such as an
    unknown time zone.
    """
    try:
        parsed = msgspec.convert(
            {name: _to_whole_number(value) for name, value in config.items()}, _TimetableConfig
        )
    except msgspec.ValidationError as error:
        raise InvalidTimetable(f"The config is invalid: {error}") from error
    if parsed.cron is not None and not is_cron_expression(parsed.cron):
        raise InvalidTimetable("The cron expression matches no time")
    if parsed.cron is None and parsed.interval_seconds is None:
        raise InvalidTimetable("The config has neither `cron` nor `intervalSeconds`", "intervalSeconds")
    if parsed.timezone not in weekly_windows.zone_names():
        raise InvalidTimetable("The time zone is unknown", "timezone")
    return ScheduleTimetable(
        cron=parsed.cron,
        interval_seconds=parsed.interval_seconds if parsed.cron is None else None,
        timezone=parsed.timezone,
        misfire=parsed.misfire,
        misfire_limit=parsed.misfire_limit,
        overlap=parsed.overlap,
        jitter_seconds=parsed.jitter_seconds,
    )


def _to_whole_number(value: object) -> object:
    """Convert a whole float, such as 60.0, to an integer; return other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@lru_cache(maxsize=4_096)
def is_cron_expression(cron: str) -> bool:
    """Return whether a text is a cron expression of five fields with single spaces between, at most 200 characters,
    that matches at least one time.
    """
    if len(cron) > CRON_CHARACTERS or len(cron.split(" ")) != CRON_FIELDS or cron != " ".join(cron.split()):
        return False
    try:
        next(CronSim(cron, _SOME_MOMENT))
    except (CronSimError, StopIteration):
        return False
    return True


def decide_instants(timetable: ScheduleTimetable, state: ScheduleState, now: datetime) -> ScheduleDecision:
    """Return the decision about all instants due since `state.next_run_at`: which of them get a run, and the next
    instant, None if there is none.

    An instant is due after the start delay of the workflow. The decision also has the reason and the time of the last
    skipped instant, None if none is skipped. Under the overlap policy `skip`, at most one instant gets a run, none
    while the last run of the schedule is in progress; otherwise runs are added up to 1,000 unstarted runs of the
    workflow.
    """
    due_until = now - timetable.start_delay(state.workflow_id)
    if state.next_run_at > due_until:
        return ScheduleDecision((), state.next_run_at)
    chosen, passed, skipped_at = _instants_to_run(timetable, state, due_until)
    room = max(0, MAX_WAITING - state.waiting_runs)
    allowed, reason = chosen[:room], SkipReason.QUEUE_FULL
    if timetable.overlap is OverlapPolicy.SKIP:
        allowed, reason = [] if state.is_busy else chosen[:1], SkipReason.OVERLAP
    if len(allowed) < len(chosen):
        passed, skipped_at = reason, chosen[-1]
    return ScheduleDecision(allowed, timetable.first_after(due_until, state.anchor_at), passed, skipped_at)


def _instants_to_run(
    timetable: ScheduleTimetable, state: ScheduleState, due_until: datetime
) -> tuple[list[datetime], SkipReason | None, datetime | None]:
    """Return the due instants to run, the reason for skipped instants, and the last skipped instant; the latter two are
    None if none is skipped.

    If the first instant is at most a minute late, all run. Otherwise the misfire policy chooses those of the last
    minute (`skip`), the last (`run_once`) or the last `misfire_limit` (`run_all`).
    """
    first, anchor_at = state.next_run_at, state.anchor_at
    in_time_since = due_until - GRACE_TIME
    if first >= in_time_since:
        return timetable.instants_between(first, due_until, anchor_at), None, None
    match timetable.misfire:
        case MisfirePolicy.SKIP:
            chosen = timetable.instants_between(in_time_since, due_until, anchor_at)
        case MisfirePolicy.RUN_ONCE:
            chosen = timetable.last_instants(1, first, due_until, anchor_at)
        case MisfirePolicy.RUN_ALL:
            chosen = timetable.last_instants(timetable.misfire_limit, first, due_until, anchor_at)
    if chosen and chosen[0] <= first:
        return chosen, None, None
    before = chosen[0] - _MICROSECOND if chosen else due_until
    left_out = timetable.last_instants(1, first, before, anchor_at)
    return chosen, SkipReason.MISSED, left_out[-1] if left_out else first


def recompute_next_instant(
    timetable: ScheduleTimetable,
    workflow_id: str,
    anchor: datetime,
    last_run_at: datetime | None,
    now: datetime,
) -> datetime | None:
    """Return the corrected next instant of a schedule after its clock was found to be ahead; None if there is none.

    `last_run_at` is the last instant that had a run, and `anchor` the time from which intervals count. Instants that
    ran early are not run again, unless the clock was over an hour ahead, after which nothing would run for long.
    """
    since = now - timetable.start_delay(workflow_id)
    if last_run_at is not None and since < last_run_at <= since + MAX_AHEAD:
        since = last_run_at
    return timetable.first_after(since, anchor)


def last_paused_instant(
    timetable: ScheduleTimetable, workflow_id: str, planned_at: datetime, anchor: datetime, now: datetime
) -> datetime | None:
    """Return the last instant that a paused schedule has skipped: its run would have begun by `now`, after the delay of
    the workflow's runs. None if it has skipped none.

    `planned_at` is the time of its last decision: no instant from then on had a run. Intervals count from `anchor`.
    """
    until = now - timetable.start_delay(workflow_id)
    found = timetable.last_instants(1, planned_at, until, anchor) if planned_at < until else []
    return found[-1] if found else None


def upcoming_instants(
    timetable: ScheduleTimetable, moment: datetime, anchor: datetime, count: int
) -> list[datetime]:
    """Return the first instants after a time, at most `count`, earliest first; intervals count from `anchor`."""
    return [*islice(timetable.instants_after(moment, anchor), count)]


def _interval_instants(step: timedelta, moment: datetime, anchor: datetime) -> Iterator[datetime]:
    """Yield without end the times after `moment` at multiples of a step after `anchor`."""
    number = max(0, (moment - anchor) // step)
    while True:
        number += 1
        yield anchor + number * step
