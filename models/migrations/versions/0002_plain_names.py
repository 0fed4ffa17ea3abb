"""Plain names: tables, columns and indexes are called as the code calls them.

Renames everything in place and in constant time, without copying or changing rows. Code of revision 0001
cannot use the tables afterwards.

Revision 0001 grew after release 0.1.0, by additions alone: a database of that release gets them first.

Revision ID: 0002
  Revises: 0001
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.schema import SchemaItem

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
TABLES = {"pace": "throttle", "signal": "wait_answer"}
COLUMNS = {
    "api_key": {"lane": "shard"},
    "attempt_span": {"lane": "shard"},
    "audit_entry": {"lane": "shard"},
    "data_source": {"lane": "shard", "sealed": "encrypted"},
    "definition": {"lane": "shard"},
    "delivery": {"lane": "shard", "derived_key": "deduplication_key"},
    "deployment": {"lane": "shard"},
    "deployment_token": {"lane": "shard"},
    "event": {"lane": "shard", "told_at": "delivered_at"},
    "event_wait": {"lane": "shard"},
    "execution": {
        "lane": "shard",
        "home": "assigned_deployment_id",
        "inbox": "channel",
        "on_trial": "isolated",
        "signals": "wait_answer_count",
        "trial_losses": "isolation_losses",
        "turn": "queue_turn",
    },
    "execution_data": {"lane": "shard"},
    "idempotency": {"lane": "shard"},
    "intake_token": {"lane": "shard", "sealed": "encrypted"},
    "lifecycle_decision": {"lane": "shard"},
    "log_line": {"lane": "shard"},
    "organization": {"lane": "shard"},
    "schedule": {"lane": "shard", "passed_at": "skipped_at", "passed_reason": "skipped_reason"},
    "signing_secret": {"lane": "shard", "sealed": "encrypted"},
    "span": {"lane": "shard"},
    "throttle": {"lane": "shard"},
    "user_account": {"lane": "shard"},
    "wait_answer": {"lane": "shard"},
    "workflow": {"lane": "shard"},
    "workflow_graph": {"lane": "shard"},
    "workflow_trigger": {"lane": "shard"},
    "workflow_version": {"lane": "shard"},
}
"""Old and new names of columns, by the new name of their table."""
INDEXES = {
    "ix_pace_next_at": ("ix_throttle_next_at", "throttle", "next_at", None),
    "ix_event_untold": ("ix_event_undelivered", "event", "created_at", "delivered_at IS NULL"),
}
"""By old name: new name, and the new names of the table, the column and those in the condition."""
POSTGRESQL_KEYS = {"pace_pkey": "throttle_pkey", "signal_pkey": "wait_answer_pkey"}
"""Indexes of primary keys; SQLite does not name them. Their constraints are renamed with them."""


def upgrade() -> None:
    """Rename tables, columns and indexes to their new names, and refuse older code."""
    _complete_first_tables()
    for old, new in TABLES.items():
        op.rename_table(old, new)
    for table, names in COLUMNS.items():
        _rename_columns(table, names)
    for old, (new, table, column, condition) in INDEXES.items():
        _rename_index(old, new, table, column, condition)
    _rename_keys(POSTGRESQL_KEYS)
    _support_from(revision)


def downgrade() -> None:
    """Rename tables, columns and indexes to their old names."""
    tables = {new: old for old, new in TABLES.items()}
    _rename_keys({new: old for old, new in POSTGRESQL_KEYS.items()})
    for table, names in COLUMNS.items():
        _rename_columns(table, {new: old for old, new in names.items()})
    for new, old in tables.items():
        op.rename_table(new, old)
    for old, (new, table, column, condition) in INDEXES.items():
        old_condition = condition and condition.replace("delivered_at", "told_at")
        _rename_index(new, old, tables.get(table, table), column, old_condition)
    _support_from(down_revision)


def _complete_first_tables() -> None:
    """Add the columns and tables of revision 0001 that a database of release 0.1.0 lacks."""
    inspector = sa.inspect(op.get_bind())
    tables = inspector.get_table_names()
    for table, columns in _added_columns().items():
        known = {column["name"] for column in inspector.get_columns(table)}
        for column in columns:
            if column.name not in known:
                op.add_column(table, column)
    for table, items in _added_tables().items():
        if table not in tables:
            op.create_table(table, *items)
    if "schema_support" not in tables:
        op.execute("INSERT INTO schema_support VALUES ('0001')")


def _added_columns() -> Mapping[str, Sequence[sa.Column[Any]]]:
    return {
        "execution": [
            sa.Column("on_trial", sa.Boolean(), nullable=False, server_default=sa.text("false")),
            sa.Column("trial_losses", sa.SmallInteger(), nullable=False, server_default=sa.text("0")),
            sa.Column("progress", sa.SmallInteger(), nullable=False, server_default=sa.text("0")),
            sa.Column("is_private", sa.Boolean(), nullable=False, server_default=sa.false()),
        ],
        "deployment": [
            sa.Column("observed_reason_code", sa.String(), nullable=True),
            sa.Column("failed_reason", sa.String(), nullable=True),
            sa.Column("failed_reason_code", sa.String(), nullable=True),
            # Rows of 0.1.0 need a value; new rows always have one.
            sa.Column("start_failures", sa.Integer(), nullable=False, server_default=sa.text("0")),
        ],
        "delivery": [sa.Column("derived_key", sa.Text(), nullable=True)],
    }


def _added_tables() -> Mapping[str, Sequence[SchemaItem]]:
    return {
        "attempt_span": [
            sa.Column("execution_id", IDENTIFIER, nullable=False),
            sa.Column("node_id", IDENTIFIER, nullable=False),
            sa.Column("iteration", IDENTIFIER, nullable=False),
            sa.Column("attempt", sa.Integer(), nullable=False, autoincrement=False),
            sa.Column("lane", sa.SmallInteger(), nullable=False),
            sa.Column("id", IDENTIFIER, nullable=False),
            sa.Column("sequence", sa.Integer(), nullable=False),
            sa.Column("label", sa.String(), nullable=False),
            sa.Column("type", sa.String(), nullable=False),
            sa.Column("status", sa.String(), nullable=False),
            sa.Column("started_at", sa.BigInteger(), nullable=True),
            sa.Column("ended_at", sa.BigInteger(), nullable=True),
            sa.Column("next_attempt_at", sa.BigInteger(), nullable=True),
            sa.Column("error", sa.Text(), nullable=True),
            sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration", "attempt"),
        ],
        "schema_support": [
            sa.Column("oldest_revision", IDENTIFIER, nullable=False),
            sa.PrimaryKeyConstraint("oldest_revision"),
        ],
    }


def _rename_columns(table: str, names: Mapping[str, str]) -> None:
    # In place: a new copy of a table could not replace it while rows of other tables refer to it.
    with op.batch_alter_table(table, recreate="never") as batch:
        for old, new in names.items():
            batch.alter_column(old, new_column_name=new)


def _rename_index(old: str, new: str, table: str, column: str, condition: str | None) -> None:
    if _is_postgresql():
        op.execute(f"ALTER INDEX {old} RENAME TO {new}")
        return
    op.drop_index(old, table)
    where = None if condition is None else sa.text(condition)
    op.create_index(new, table, [column], unique=False, sqlite_where=where)


def _rename_keys(names: Mapping[str, str]) -> None:
    if _is_postgresql():
        for old, new in names.items():
            op.execute(f"ALTER INDEX {old} RENAME TO {new}")


def _support_from(oldest_revision: str) -> None:
    """Store the oldest revision of code that may use the tables; older code refuses them."""
    op.execute(sa.text("UPDATE schema_support SET oldest_revision = :it").bindparams(it=oldest_revision))


def _is_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"
