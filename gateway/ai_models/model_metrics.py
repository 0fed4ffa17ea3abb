"""Endpoint of the metrics of a language model: calls, failures, tokens, cost and latency over a window of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, func, literal_column, select, text, type_coerce
from sqlmodel import col

from engine.model_prices import show_cost
from gateway.ai_models import model_editing
from gateway.http import preconditions
from gateway.http.parameters import ChoiceParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from models.duration_histogram import estimate_quantile
from models.model_hour import ModelHour
from models.timestamps import from_microseconds, hour_of, to_microseconds

if TYPE_CHECKING:
    from sqlalchemy import Row, Select


class MetricsWindow(StrEnum):
    """Window of time up to now."""

    DAY = "24h"
    WEEK = "7d"
    MONTH = "30d"
    QUARTER = "90d"


WINDOW: Final = ChoiceParameter(
    "window",
    "Time up to now: `24h`, the default, by hours, and `7d`, `30d` and `90d` by days.",
    MetricsWindow,
)
_DAYS: Final[Mapping[MetricsWindow, int]] = {
    MetricsWindow.WEEK: 7,
    MetricsWindow.MONTH: 30,
    MetricsWindow.QUARTER: 90,
}
_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)
_AMOUNTS: Final = ("calls", "unpriced_calls", "input_tokens", "output_tokens", "cost")


class ModelErrorCount(WireStruct):
    """Failed calls with one code."""

    code: str
    count: int


class ModelAmounts(WireStruct):
    """Calls of a model within a time. Those that a budget, a limit or a block has refused were not made."""

    requests: int
    """Calls that were made: answered ones, and failed ones, also those for which there was no connection."""
    failed: int
    input_tokens: int
    output_tokens: int
    cost: str
    """US dollars as a decimal text, of the answered calls with a known cost."""
    unpriced_requests: int
    """Answered calls whose cost is unknown."""
    p50_ms: int | None
    """Median of the times from the request to the complete answer, within 10 %; null without answers."""
    p95_ms: int | None


class ModelPeriod(ModelAmounts, kw_only=True):
    """Calls of a model that ended within an hour or a day (UTC)."""

    starts_at: Instant


class ModelMetrics(WireStruct):
    """Metrics of a model over a window of time."""

    model_id: str
    window: MetricsWindow
    since: Instant
    as_of: Instant
    total: ModelAmounts
    errors: Sequence[ModelErrorCount]
    """Failed calls by code, the most frequent first."""
    periods: Sequence[ModelPeriod]
    """Hours or days, the earliest first; without calls, they have zeros."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the metrics of a model: of all calls of the organization, so to its owner and admins only.

    A call counts in the hour of its end, within about a second. A killed worker loses the counts of its last second.
    """
    gateway = request.gateway
    model = (await model_editing.read(gateway.database, request.requested_object)).model
    preconditions.require_owner(request.caller, model.owner_id, what="model")
    window, now = request.query[WINDOW] or MetricsWindow.DAY, gateway.clock()
    starts = list_periods(window, now)
    statement = periods_statement(model.organization_id, model.id, starts[0], starts[1] - starts[0])
    async with gateway.database.read() as connection:
        rows = (await connection.execute(statement)).all()
    by_start: dict[datetime, list[Row[*tuple[Any, ...]]]] = {start: [] for start in starts}
    for row in rows:
        begin = from_microseconds(int(row.period) * ((starts[1] - starts[0]) // timedelta(microseconds=1)))
        by_start.setdefault(begin, []).append(row)
    errors = Counter[str]()
    for row in rows:
        if row.error:
            errors[row.error] += int(row.calls)
    return JsonResponse(
        ModelMetrics(
            model_id=model.id,
            window=window,
            since=instant(starts[0]),
            as_of=instant(now),
            total=ModelAmounts(**_sum_rows(rows)),
            errors=[ModelErrorCount(code=code, count=count) for code, count in errors.most_common()],
            periods=[
                ModelPeriod(starts_at=instant(begin), **_sum_rows(by_start[begin]))
                for begin in sorted(by_start)
            ],
        )
    )


def list_periods(window: MetricsWindow, now: datetime) -> Sequence[datetime]:
    """Return the start times of the hours or days of a window in UTC, the earliest first; the last period is the
    present one.
    """
    if window is MetricsWindow.DAY:
        return [hour_of(now) - number * _HOUR for number in reversed(range(24))]
    today = hour_of(now).replace(hour=0)
    return [today - number * _DAY for number in reversed(range(_DAYS[window]))]


def periods_statement(
    organization_id: str, model_id: str, since: datetime, length: timedelta
) -> Select[*tuple[Any, ...]]:
    """Return the statement that sums the calls of a model since a time by period, error code and duration.

    `length` is that of a period, an hour or a day; `period` in a row is the number of such periods since 1970.
    """
    size = to_microseconds(since + length) - to_microseconds(since)
    period = type_coerce(col(ModelHour.starts_at), BigInteger) // literal_column(str(size))
    sums = (func.sum(col(getattr(ModelHour, name))).label(name) for name in _AMOUNTS)
    return (
        select(period.label("period"), col(ModelHour.error), col(ModelHour.bucket), *sums)
        .where(
            col(ModelHour.organization_id) == organization_id,
            col(ModelHour.model_id) == model_id,
            col(ModelHour.starts_at) >= since,
        )
        .group_by(text("1, 2, 3"))
    )


def _sum_rows(rows: Iterable[Row[*tuple[Any, ...]]]) -> dict[str, Any]:
    """Return the fields of `ModelAmounts` for the sums of rows of `periods_statement`."""
    total, times = Counter[str](), Counter[str]()
    failed = 0
    for row in rows:
        total.update({name: int(getattr(row, name)) for name in _AMOUNTS})
        if row.error:
            failed += int(row.calls)
        else:
            times[str(row.bucket)] += int(row.calls)
    return {
        "requests": total["calls"],
        "failed": failed,
        "input_tokens": total["input_tokens"],
        "output_tokens": total["output_tokens"],
        "cost": show_cost(total["cost"]) or "0",
        "unpriced_requests": total["unpriced_calls"],
        "p50_ms": estimate_quantile(times, 50),
        "p95_ms": estimate_quantile(times, 95),
    }
