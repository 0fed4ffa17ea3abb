"""Spans of a run in one row, views of packed and of all spans, and the newest revision that each process knows.

Revision ID: 0051
Revises: 0050
"""

from collections.abc import Callable

import sqlalchemy as sa
from alembic import op

revision = "0051"
down_revision = "0050"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
PRESENCES = ("process_presence", "worker_presence")
COLUMNS: dict[str, str | tuple[str, int | None]] = {
    "execution_id": "pack",
    "node_id": ("identifier", 0),
    "iteration": ("identifier", 1),
    "shard": "pack",
    "id": ("identifier", 2),
    "sequence": ("integer", 3),
    "label": ("string", 4),
    "type": ("string", 5),
    "status": ("string", 6),
    "port": ("string", 7),
    "attempt": "1",
    "started_at": ("bigint", 8),
    "ended_at": ("bigint", 9),
    "wake_at": ("bigint", None),
    "input_node": ("identifier", 10),
    "input": ("text", 11),
    "output": ("text", 12),
    "error": ("text", None),
    "unresolved": ("text", 13),
    "awaits": ("text", None),
    "resolved_config": ("text", None),
    "hashes": "hashes",
    "input_blob": ("text", None),
    "output_blob": ("text", None),
    "reused_from": ("identifier", None),
    "key_id": ("identifier", None),
    "rendered_config": ("text", 14),
    "model_calls": ("text", None),
}
"""Columns of a span, with their type and their index in the array of a packed span; None for those that it has not."""
HASHES = (15, 16)
"""Indexes of the place and the length of a span's hashes in those of its run."""


def upgrade() -> None:
    """Create the table, the views and the columns; no row is changed."""
    op.create_table(
        "span_pack",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("spans", sa.Text(), nullable=False),
        sa.Column("hashes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id"),
    )
    for table in PRESENCES:
        op.add_column(table, sa.Column("revision", IDENTIFIER, nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        # Rows of up to 8 kB are neither compressed nor stored apart: both would cost more than they save.
        op.execute("ALTER TABLE span_pack SET (toast_tuple_target = 8160)")
        _create_views(_postgresql_column, "json_array_elements(span_pack.spans::json) AS item (value)")
    else:
        _create_views(_sqlite_column, "json_each(span_pack.spans) AS item")


def downgrade() -> None:
    """Unpack the spans, and drop the views, the table and the columns."""
    names = ", ".join(COLUMNS)
    op.execute(
        f"INSERT INTO span ({names}) SELECT {names} FROM packed_span"  # noqa: S608 - names of columns
    )
    op.execute("DROP VIEW recorded_span")
    op.execute("DROP VIEW packed_span")
    op.drop_table("span_pack")
    for table in PRESENCES:
        op.drop_column(table, "revision")


def _create_views(column: Callable[[str, int | None], str], items: str) -> None:
    """Create the views of packed and of all spans, whose columns have the same types, so that conditions reach both."""
    packed = ", ".join(f"{_packed_column(name, kind, column)} AS {name}" for name, kind in COLUMNS.items())
    op.execute(
        f"CREATE VIEW packed_span AS SELECT {packed} FROM span_pack CROSS JOIN {items}"  # noqa: S608 - names of columns
    )
    names = ", ".join(COLUMNS)
    op.execute(
        f"CREATE VIEW recorded_span AS SELECT {names} FROM span"  # noqa: S608 - names of columns
        f" UNION ALL SELECT {names} FROM packed_span"
    )


def _packed_column(
    name: str, kind: str | tuple[str, int | None], column: Callable[[str, int | None], str]
) -> str:
    if kind == "pack":
        return f"span_pack.{name}"
    if kind == "hashes":
        place, length = (column("integer", index) for index in HASHES)
        return f"CAST(substr(span_pack.hashes, {place}, {length}) AS {column('bytes', None)})"
    return kind if isinstance(kind, str) else column(*kind)


def _postgresql_column(kind: str, index: int | None) -> str:
    if kind == "bytes":
        return "bytea"
    value = "NULL" if index is None else f"(item.value ->> {index})"
    if kind == "identifier":
        return f'{value}::varchar COLLATE "C"'
    return f"{value}::{'varchar' if kind == 'string' else kind}"


def _sqlite_column(kind: str, index: int | None) -> str:
    if kind == "bytes":
        return "BLOB"
    value = "NULL" if index is None else f"json_extract(item.value, '$[{index}]')"
    # Without an affinity, the conditions of a query would not reach the tables of the view.
    return f"CAST({value} AS {'INTEGER' if kind in {'integer', 'bigint'} else 'TEXT'})"
