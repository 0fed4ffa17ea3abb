"""Lifecycle policies in the API, which equals their stored form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.http import errors, limits
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire, WireStruct
from models import lifecycle_policy, weekly_windows
from models.lifecycle_policy import PolicyType
from models.weekly_windows import EmptyWindow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HOUR: Final = "([01][0-9]|2[0-3]):[0-5][0-9]"
_LENGTH: Final = 5  # the pattern alone would allow a trailing line break


class WindowShape(GuardedWire):
    """Weekly window: hours on some days of the week."""

    days: Annotated[list[Annotated[int, Meta(ge=0, le=6)]], Meta(min_length=1, max_length=7)]
    """Days on which the window opens: 0 is Sunday, 6 is Saturday."""
    start_time: Annotated[
        str, Meta(pattern=f"^{_HOUR}$", max_length=_LENGTH, description="a time such as 09:00")
    ]
    end_time: Annotated[
        str,
        Meta(pattern=f"^({_HOUR}|24:00)$", max_length=_LENGTH, description="a time such as 17:00, or 24:00"),
    ]
    """An end before the start is on the following day; 00:00 to 00:00 is the whole day."""


class ScheduleShape(GuardedWire):
    """Windows in which a workflow has pods."""

    timezone: Annotated[str, Meta(extra_json_schema={"maxLength": limits.TIMEZONE_LENGTH})]
    """Name in the IANA time zone database; the windows use the local time of this zone."""
    windows: Annotated[list[WindowShape], Meta(min_length=1, max_length=limits.WINDOWS)]
    """Overlapping windows are merged."""


class LifecyclePolicy(GuardedWire):
    """Rule for the times at which a deployed workflow has pods."""

    type: PolicyType
    idle_timeout_minutes: (
        Annotated[int, Meta(ge=lifecycle_policy.IDLE_MINUTES_MIN, le=lifecycle_policy.IDLE_MINUTES_MAX)]
        | None
    ) = None
    """For `idle-shutdown`: minutes without activity before a stop, 30 if absent. Other types don't store it."""
    schedule: ScheduleShape | None = None
    """For `scheduled-window`, which requires it. Other types don't store it."""


class PolicyPreviewRequest(LifecyclePolicy, forbid_unknown_fields=True):
    """Policy to preview."""


class PolicyShape(WireStruct, omit_defaults=True):
    """Policy with the fields of its type."""

    type: PolicyType
    idle_timeout_minutes: int | float | UnsetType = UNSET
    schedule: ScheduleShape | UnsetType = UNSET


def to_stored_policy(body: LifecyclePolicy) -> dict[str, Any]:
    """Return a policy in its stored form: the fields of its type only, with the default of `idleTimeoutMinutes`.

    Raises a 422 error for a `scheduled-window` without or with an invalid schedule.
    """
    match body.type:
        case PolicyType.IDLE_SHUTDOWN:
            minutes = body.idle_timeout_minutes
            default = lifecycle_policy.IDLE_MINUTES_DEFAULT
            return {"type": body.type.value, "idleTimeoutMinutes": default if minutes is None else minutes}
        case PolicyType.SCHEDULED_WINDOW:
            if body.schedule is None:
                message = "A scheduled-window needs a schedule with timezone and windows"
                raise errors.invalid([errors.problem("schedule", "required", message)])
            _check(body.schedule)
            return {"type": body.type.value, "schedule": msgspec.to_builtins(body.schedule)}
        case _:
            return {"type": body.type.value}


def show_policy(policy: Mapping[str, Any]) -> PolicyShape:
    """Return the API form of a stored policy."""
    return msgspec.convert(policy, PolicyShape)


def _check(schedule: ScheduleShape) -> None:
    """Raise a 422 error with all problems of a schedule: an unknown time zone or an empty window."""
    problems = ProblemCollector()
    if schedule.timezone not in weekly_windows.zone_names():
        message = "schedule.timezone must be the name of a zone, such as America/Los_Angeles or UTC"
        problems.add("schedule.timezone", "unknown-timezone", message)
    _check_windows(schedule.windows, problems)
    problems.raise_any()


def _check_windows(given: Sequence[WindowShape], problems: ProblemCollector) -> None:
    """Add a problem for each window of no length."""
    for index, one in enumerate(given):
        path = f"schedule.windows.{index}.endTime"
        try:
            weekly_windows.parse_window(one.days, one.start_time, one.end_time)
        except EmptyWindow:
            message = f"{path} must differ from startTime; 00:00 to 00:00 is the whole day"
            problems.add(path, "empty-window", message)
