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

from models import windows

GRACE: Final = timedelta(minutes=1)
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


class Misfire(StrEnum):
    """What becomes of instants that were missed."""

    SKIP = "skip"
    RUN_ONCE = "run-once"
    """All that are due become one run, that of the last."""
    RUN_ALL = "run-all"
    """The last of them are run, as many as the limit says."""


class Overlap(StrEnum):
    """What becomes of an instant at which an earlier run goes on."""

    ALLOW = "allow"
    SKIP = "skip"
    QUEUE = "queue"


class Passed(StrEnum):
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
class Timetable:
    """A schedule as its config says it."""

    cron: str | None
    interval_seconds: int | None
    """The one that isn't None says when."""
    timezone: str
    misfire: Misfire
    misfire_limit: int
    overlap: Overlap
    jitter_seconds: int

    @cached_property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    @property
    def timing_hash(self) -> str:
        """Return what changes with the instants, and with nothing else."""
        timing = (self.cron, self.interval_seconds, self.timezone, self.jitter_seconds)
        return sha256(msgspec.json.encode(timing)).hexdigest()

    def delay_of(self, workflow_id: str) -> timedelta:
        """Return how much later than its instants a workflow's runs start: less than the jitter, always the same."""
        digest = blake2b(workflow_id.encode(), digest_size=4).digest()
        return timedelta(
            milliseconds=self.jitter_seconds * 1_000 * int.from_bytes(digest, "big") // 256 ** len(digest)
        )

    def first_after(self, moment: datetime, anchor: datetime) -> datetime | None:
        """Return the next instant; None where there is none any more. Intervals are counted from `anchor`."""
        return next(self.after(moment, anchor), None)

    def after(self, moment: datetime, anchor: datetime) -> Iterator[datetime]:
        """Return all instants after a moment, in UTC."""
        if self.interval_seconds is not None:
            yield from _every(timedelta(seconds=self.interval_seconds), moment, anchor)
            return
        for local in CronSim(self.cron or "", moment.astimezone(self.zone)):
            instant = local.astimezone(UTC)
            # In an hour that the clocks repeat, it begins with the first of the two.
            if instant > moment:
                yield instant

    def between(self, first: datetime, last: datetime, anchor: datetime) -> list[datetime]:
        """Return the instants from `first` to `last`, both included."""
        return [*takewhile(lambda instant: instant <= last, self.after(first - _MICROSECOND, anchor))]

    def last_of(self, count: int, first: datetime, last: datetime, anchor: datetime) -> list[datetime]:
        """Return the last instants from `first` to `last`, without going through all of a long time."""
        stretch = _FIRST_STRETCH
        while True:
            start = max(first, last - stretch)
            found = self.between(start, last, anchor)
            if len(found) >= count or start == first:
                return found[-count:]
            stretch *= _STRETCHED


class _Config(msgspec.Struct, rename="camel"):
    """What the node type allows, with its defaults."""

    cron: str | None = None
    interval_seconds: Annotated[int, msgspec.Meta(ge=1, le=31_536_000)] | None = None
    timezone: str = "UTC"
    misfire: Misfire = Misfire.RUN_ONCE
    misfire_limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = MISFIRE_LIMIT
    overlap: Overlap = Overlap.ALLOW
    jitter_seconds: Annotated[int, msgspec.Meta(ge=0, le=3_600)] = 0


@dataclass(frozen=True, slots=True)
class State:
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
class Decided:
    """What is to be done about all instants that are due."""

    run: Sequence[datetime]
    """In order."""
    next_run_at: datetime | None
    passed: Passed | None = None
    """Why some were passed over; None: none was."""
    passed_at: datetime | None = None
    """The last of those."""


def timetable_of(config: Mapping[str, Any]) -> Timetable:
    """Return what a trigger's stored config says; raises `InvalidTimetable` where no process here could follow it.

    A draft's config may be anything.
    """
    try:
        said = msgspec.convert({name: _whole(value) for name, value in config.items()}, _Config)
    except msgspec.ValidationError as error:
        raise InvalidTimetable(f"Its config is wrong: {error}") from error
    if said.cron is not None and not fires(said.cron):
        raise InvalidTimetable("The cron expression never comes true")
    if said.cron is None and said.interval_seconds is None:
        raise InvalidTimetable("It says neither `cron` nor `intervalSeconds`")
    if said.timezone not in windows.zones():
        raise InvalidTimetable("Its time zone is not known here")
    return Timetable(
        cron=said.cron,
        interval_seconds=said.interval_seconds if said.cron is None else None,
        timezone=said.timezone,
        misfire=said.misfire,
        misfire_limit=said.misfire_limit,
        overlap=said.overlap,
        jitter_seconds=said.jitter_seconds,
    )


def _whole(value: object) -> object:
    """Return a number that is whole, such as 60.0, as one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@lru_cache(maxsize=4_096)
def fires(cron: str) -> bool:
    """Tell whether a text is a cron expression of five fields that comes true at some time."""
    if len(cron) > CRON_CHARACTERS or len(cron.split(" ")) != CRON_FIELDS or cron != " ".join(cron.split()):
        return False
    try:
        next(CronSim(cron, _SOME_MOMENT))
    except (CronSimError, StopIteration):
        return False
    return True


def decide(timetable: Timetable, state: State, now: datetime) -> Decided:
    """Return which of the instants from `state.next_run_at` on that are due are run; none of them is due again."""
    due_until = now - timetable.delay_of(state.workflow_id)
    if state.next_run_at > due_until:
        return Decided((), state.next_run_at)
    chosen, passed, passed_at = _in_time(timetable, state, due_until)
    room = max(0, MAX_WAITING - state.waiting_runs)
    allowed, reason = chosen[:room], Passed.QUEUE_FULL
    if timetable.overlap is Overlap.SKIP:
        allowed, reason = [] if state.is_busy else chosen[:1], Passed.OVERLAP
    if len(allowed) < len(chosen):
        passed, passed_at = reason, chosen[-1]
    return Decided(allowed, timetable.first_after(due_until, state.anchor_at), passed, passed_at)


def _in_time(
    timetable: Timetable, state: State, due_until: datetime
) -> tuple[list[datetime], Passed | None, datetime | None]:
    """Return the due instants that the misfire policy has run; why others are left out, and the last of these."""
    first, anchor_at = state.next_run_at, state.anchor_at
    in_time_since = due_until - GRACE
    if first >= in_time_since:
        return timetable.between(first, due_until, anchor_at), None, None
    match timetable.misfire:
        case Misfire.SKIP:
            chosen = timetable.between(in_time_since, due_until, anchor_at)
        case Misfire.RUN_ONCE:
            chosen = timetable.last_of(1, first, due_until, anchor_at)
        case Misfire.RUN_ALL:
            chosen = timetable.last_of(timetable.misfire_limit, first, due_until, anchor_at)
    if chosen and chosen[0] <= first:
        return chosen, None, None
    before = chosen[0] - _MICROSECOND if chosen else due_until
    left_out = timetable.last_of(1, first, before, anchor_at)
    return chosen, Passed.MISSED, left_out[-1] if left_out else first


def decided_anew(
    timetable: Timetable, workflow_id: str, anchor: datetime, last_run_at: datetime | None, now: datetime
) -> datetime | None:
    """Return the next instant of a schedule whose clock was ahead when its own was worked out.

    What was run early is not run again, unless the clock was so far ahead that nothing would be run for long.
    """
    since = now - timetable.delay_of(workflow_id)
    if last_run_at is not None and since < last_run_at <= since + MAX_AHEAD:
        since = last_run_at
    return timetable.first_after(since, anchor)


def upcoming(timetable: Timetable, moment: datetime, anchor: datetime, count: int) -> list[datetime]:
    """Return the next instants after a moment."""
    return [*islice(timetable.after(moment, anchor), count)]


def _every(step: timedelta, moment: datetime, anchor: datetime) -> Iterator[datetime]:
    """Return the multiples of a step after `anchor` that are after a moment too."""
    number = max(0, (moment - anchor) // step)
    while True:
        number += 1
        yield anchor + number * step
