"""Hourly counts of the calls of language models, which their metrics show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy.dialects import postgresql, sqlite

from models.duration_histogram import find_bucket
from models.model_hour import ModelHour
from models.timestamps import hour_of

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.model_calls import FailedModelCall, ModelSettlement


SUM_COLUMNS: Final = ("calls", "unpriced_calls", "input_tokens", "output_tokens", "cost")
"""Columns to which each call adds."""


class ModelHourKey(NamedTuple):
    """Primary key of an hour's count; the order of keys is the order of the locks of their rows."""

    organization_id: str
    model_id: str
    starts_at: datetime
    error: str
    bucket: int


class ModelHourCounts:
    """Counts of calls that are stored together."""

    def __init__(self) -> None:
        self._counts: dict[ModelHourKey, Counter[str]] = {}

    def add_answer(self, organization_id: str, settlement: ModelSettlement, ended_at: datetime) -> None:
        """Add an answered call to the counts of its model and hour, which `store` writes."""
        bucket = find_bucket(settlement.duration_milliseconds)
        key = ModelHourKey(organization_id, settlement.model_id, hour_of(ended_at), "", bucket)
        self._add(key, count_settlement(settlement))

    def add_failure(self, organization_id: str, failed: FailedModelCall, ended_at: datetime) -> None:
        """Add a call without an answer to the counts of its model and hour, which `store` writes."""
        key = ModelHourKey(organization_id, failed.model_id, hour_of(ended_at), failed.error, 0)
        self._add(key, {"calls": 1})

    def _add(self, key: ModelHourKey, amounts: Mapping[str, int]) -> None:
        self._counts.setdefault(key, Counter()).update(amounts)

    async def store(self, connection: AsyncConnection) -> None:
        """Add the counts to those in the database in one statement, in the order of their keys; a second call adds them
        again.
        """
        if not self._counts:
            return
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        columns = ModelHour.__table__.c  # type: ignore[attr-defined]  # SQLModel doesn't declare it
        statement = insert(ModelHour)
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=list(ModelHourKey._fields),
                set_={name: columns[name] + statement.excluded[name] for name in SUM_COLUMNS},
            ),
            [
                {**key._asdict(), **{name: amounts[name] for name in SUM_COLUMNS}}
                for key, amounts in sorted(self._counts.items())
            ],
        )


def count_settlement(settlement: ModelSettlement) -> dict[str, int]:
    """Return the amounts that an answered call adds to the sums of its hour and month."""
    return {
        "calls": 1,
        "unpriced_calls": int(settlement.cost is None),
        "input_tokens": settlement.usage.input_tokens,
        "output_tokens": settlement.usage.output_tokens,
        "cost": settlement.cost or 0,
    }
