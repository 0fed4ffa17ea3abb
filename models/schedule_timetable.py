"""When a schedule is due, and which of its instants are run when somebody looks.

All of it is rules, with the clock among their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from hashlib import blake2b, sha256
from itertools import islice, takewhile
from typing import Annotated, Any, Final
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim, CronSimError

from models import weekly_windows

GRACE_TIME: Final = timedelta(minutes=1)
"""An instant that is looked at later than this was missed; until then it counts as on time."""
MISFIRE_LIMIT: Final = 10
"""Missed instants that are run where a schedule doesn't say how many."""
MAX_WAITING: Final = 1_000
"""While so many runs of its workflow wait to be begun, a schedule passes its instants over."""
MAX_AHEAD: Final = timedelta(hours=1)
"""A clock that was ahead by more than this may have things run twice once it is right again."""
CRON_FIELDS: Final = 5
CRON_CHARACTERS: Final = 200
_FIRST_STRETCH: Final = timedelta(hours=1)
_STRETCHED: Final = 8
_MICROSECOND: Final = timedelta(microseconds=1)
_SOME_MOMENT: Final = datetime(2024, 1, 1, tzinfo=UTC)


class InvalidTimetable(ValueError):
    """The config of a schedule says nothing that can be followed here; the text says why."""


class MisfirePolicy(StrEnum):
    """What becomes of instants that were missed."""

    SKIP = "skip"
    RUN_ONCE = "run-once"
    """All that are due become one run, that of the last."""
    RUN_ALL = "run-all"
    """The last of them are run, as many as the limit says."""


class OverlapPolicy(StrEnum):
    """What becomes of an instant at which an earlier run goes on."""

    ALLOW = "allow"
    SKIP = "skip"
    QUEUE = "queue"


class SkipReason(StrEnum):
    """Why an instant was passed over."""

    MISSED = "missed"
    """Nobody looked in time, and the misfire policy leaves it out."""
    OVERLAP = "overlap"
    """An earlier run went on."""
    QUEUE_FULL = "queue-full"
    """Too many runs of the workflow waited to be begun."""
    CONCURRENCY_LIMIT = "concurrency-limit"
    """As many runs went on as the workflow's settings allow, and those say that further ones are refused."""


@dataclass(frozen=True)
class ScheduleTimetable:
    """A schedule as its config says it."""

    cron: str | None
    interval_seconds: int | None
    """The one that isn't None says when."""
    timezone: str
    misfire: MisfirePolicy
    misfire_limit: int
    overlap: OverlapPolicy
    jitter_seconds: int

    @cached_property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    @property
    def timing_hash(self) -> str:
        """Return what changes with the instants, and with nothing else."""
        timing = (self.cron, self.interval_seconds, self.timezone, self.jitter_seconds)
        return sha256(msgspec.json.encode(timing)).hexdigest()

    def start_delay(self, workflow_id: str) -> timedelta:
        """Return how much later than its instants a workflow's runs start: less than the jitter, always the same."""
        digest = blake2b(workflow_id.encode(), digest_size=4).digest()
        return timedelta(
            milliseconds=self.jitter_seconds * 1_000 * int.from_bytes(digest, "big") // 256 ** len(digest)
        )

    def first_after(self, moment: datetime, anchor: datetime) -> datetime | None:
        """Return the next instant; None where there is none any more. Intervals are counted from `anchor`."""
        return next(self.instants_after(moment, anchor), None)

    def instants_after(self, moment: datetime, anchor: datetime) -> Iterator[datetime]:
        """Return all instants after a moment, in UTC."""
        if self.interval_seconds is not None:
            yield from _interval_instants(timedelta(seconds=self.interval_seconds), moment, anchor)
            return
        for local in CronSim(self.cron or "", moment.astimezone(self.zone)):
            instant = local.astimezone(UTC)
            # In an hour that the clocks repeat, it begins with the first of the two.
            if instant > moment:
                yield instant

    def instants_between(self, first: datetime, last: datetime, anchor: datetime) -> list[datetime]:
        """Return the instants from `first` to `last`, both included."""
        return [
            *takewhile(lambda instant: instant <= last, self.instants_after(first - _MICROSECOND, anchor))
        ]

    def last_instants(self, count: int, first: datetime, last: datetime, anchor: datetime) -> list[datetime]:
        """Return the last instants from `first` to `last`, without going through all of a long time."""
        stretch = _FIRST_STRETCH
        while True:
            start = max(first, last - stretch)
            found = self.instants_between(start, last, anchor)
            if len(found) >= count or start == first:
                return found[-count:]
            stretch *= _STRETCHED


class _TimetableConfig(msgspec.Struct, rename="camel"):
    """What the node type allows, with its defaults."""

    cron: str | None = None
    interval_seconds: Annotated[int, msgspec.Meta(ge=1, le=31_536_000)] | None = None
    timezone: str = "UTC"
    misfire: MisfirePolicy = MisfirePolicy.RUN_ONCE
    misfire_limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = MISFIRE_LIMIT
    overlap: OverlapPolicy = OverlapPolicy.ALLOW
    jitter_seconds: Annotated[int, msgspec.Meta(ge=0, le=3_600)] = 0


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """Where a schedule is."""

    workflow_id: str
    anchor_at: datetime
    next_run_at: datetime
    """The first instant that nobody has decided about."""
    is_busy: bool = False
    """Its last run goes on."""
    waiting_runs: int = 0
    """Those of its workflow that nobody has begun."""


@dataclass(frozen=True, slots=True)
class ScheduleDecision:
    """What is to be done about all instants that are due."""

    run: Sequence[datetime]
    """In order."""
    next_run_at: datetime | None
    passed: SkipReason | None = None
    """Why some were passed over; None: none was."""
    skipped_at: datetime | None = None
    """The last of those."""


def parse_timetable(config: Mapping[str, Any]) -> ScheduleTimetable:
    """Return what a trigger's stored config says; raises `InvalidTimetable` where no process here could follow it.

    A draft's config may be anything.
    """
    try:
        said = msgspec.convert(
            {name: _to_whole_number(value) for name, value in config.items()}, _TimetableConfig
        )
    except msgspec.ValidationError as error:
        raise InvalidTimetable(f"Its config is wrong: {error}") from error
    if said.cron is not None and not is_cron_expression(said.cron):
        raise InvalidTimetable("The cron expression never comes true")
    if said.cron is None and said.interval_seconds is None:
        raise InvalidTimetable("It says neither `cron` nor `intervalSeconds`")
    if said.timezone not in weekly_windows.zone_names():
        raise InvalidTimetable("Its time zone is not known here")
    return ScheduleTimetable(
        cron=said.cron,
        interval_seconds=said.interval_seconds if said.cron is None else None,
        timezone=said.timezone,
        misfire=said.misfire,
        misfire_limit=said.misfire_limit,
        overlap=said.overlap,
        jitter_seconds=said.jitter_seconds,
    )


def _to_whole_number(value: object) -> object:
    """Return a number that is whole, such as 60.0, as one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@lru_cache(maxsize=4_096)
def is_cron_expression(cron: str) -> bool:
    """Tell whether a text is a cron expression of five fields that comes true at some time."""
    if len(cron) > CRON_CHARACTERS or len(cron.split(" ")) != CRON_FIELDS or cron != " ".join(cron.split()):
        return False
    try:
        next(CronSim(cron, _SOME_MOMENT))
    except (CronSimError, StopIteration):
        return False
    return True


def decide_instants(timetable: ScheduleTimetable, state: ScheduleState, now: datetime) -> ScheduleDecision:
    """Return which of the instants from `state.next_run_at` on that are due are run; none of them is due again."""
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
    """Return the due instants that the misfire policy has run; why others are left out, and the last of these."""
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
    """Return the next instant of a schedule whose clock was ahead when its own was worked out.

    What was run early is not run again, unless the clock was so far ahead that nothing would be run for long.
    """
    since = now - timetable.start_delay(workflow_id)
    if last_run_at is not None and since < last_run_at <= since + MAX_AHEAD:
        since = last_run_at
    return timetable.first_after(since, anchor)


def upcoming_instants(
    timetable: ScheduleTimetable, moment: datetime, anchor: datetime, count: int
) -> list[datetime]:
    """Return the next instants after a moment."""
    return [*islice(timetable.instants_after(moment, anchor), count)]


def _interval_instants(step: timedelta, moment: datetime, anchor: datetime) -> Iterator[datetime]:
    """Return the multiples of a step after `anchor` that are after a moment too."""
    number = max(0, (moment - anchor) // step)
    while True:
        number += 1
        yield anchor + number * step
