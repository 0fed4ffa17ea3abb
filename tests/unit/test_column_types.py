"""Objects of stored rows are those that the constructors of tables make."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import inspect

from models.access import User, UserRole
from models.column_types import build_row
from models.run_hour import RunHour

COLUMNS: dict[str, Any] = {
    "id": "user_1",
    "organization_id": "org_1",
    "shard": 0,
    "email": "ada@example.com",
    "name": "Ada",
    "role": UserRole.ADMIN,
    "created_at": datetime(2026, 1, 1, tzinfo=UTC),
}


def test_a_row_has_the_values_of_its_columns_and_may_be_changed() -> None:
    row = build_row(User, COLUMNS)
    assert row == User(**COLUMNS)
    assert row.model_dump() == COLUMNS
    row.name = "Grace"
    assert (row.name, row.model_dump()["name"]) == ("Grace", "Grace")
    assert inspect(row).attrs.name.history.added == ["Grace"]


def test_a_row_without_some_columns_has_their_defaults_and_no_other_columns() -> None:
    given = {name: value for name, value in COLUMNS.items() if name not in {"name", "role"}}
    row = build_row(User, {**given, "listed_at": None})
    assert (row.name, row.role) == ("", UserRole.MEMBER)
    assert "listed_at" not in row.model_dump()


def test_a_default_that_can_be_changed_is_of_one_row() -> None:
    one, other = (build_row(RunHour, {"organization_id": "org_1", "accepted": 4}) for _ in range(2))
    one.run_times["26"] = 1
    assert (other.accepted, other.failed, other.run_times) == (4, 0, {})
