"""Tasks of custom nodes, their workers, and the node types of API keys.

Revision ID: 0020
Revises: 0019
"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

HELD_OR_READY = "state IN ('ready', 'leased', 'cancel_requested')"
IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the tables, and add the column."""
    op.add_column("api_key", sa.Column("node_types", sa.Text(), nullable=True))
    _create_tasks()
    _create_workers()


def _create_tasks() -> None:
    """Create the table of tasks."""
    op.create_table(
        "task",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("type", IDENTIFIER, nullable=False),
        sa.Column("version", IDENTIFIER, nullable=False),
        sa.Column("content_hash", IDENTIFIER, nullable=False),
        sa.Column("pool", IDENTIFIER, nullable=False),
        sa.Column("queue", IDENTIFIER, nullable=False),
        sa.Column("queue_turn", sa.SmallInteger(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("is_fresh", sa.Boolean(), nullable=False),
        sa.Column("is_write", sa.Boolean(), nullable=False),
        sa.Column("is_at_most_once", sa.Boolean(), nullable=False),
        sa.Column("key", IDENTIFIER, nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("input", sa.Text(), nullable=True),
        sa.Column("input_bytes", sa.Integer(), nullable=False),
        sa.Column("timeout_microseconds", sa.BigInteger(), nullable=False),
        sa.Column("lease_microseconds", sa.BigInteger(), nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column("first_delay_microseconds", sa.BigInteger(), nullable=False),
        sa.Column("max_delay_microseconds", sa.BigInteger(), nullable=False),
        sa.Column("delay_grows", sa.Boolean(), nullable=False),
        sa.Column("concurrency_key", IDENTIFIER, nullable=True),
        sa.Column("concurrency_limit", sa.Integer(), nullable=True),
        sa.Column("state", IDENTIFIER, nullable=False),
        sa.Column("failures", sa.SmallInteger(), nullable=False),
        sa.Column("losses", sa.SmallInteger(), nullable=False),
        sa.Column("unacknowledged", sa.SmallInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("lease", IDENTIFIER, nullable=True),
        sa.Column("worker_id", IDENTIFIER, nullable=True),
        sa.Column("claim_id", IDENTIFIER, nullable=True),
        sa.Column("claimed_at", sa.BigInteger(), nullable=True),
        sa.Column("is_acknowledged", sa.Boolean(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("deadline_at", sa.BigInteger(), nullable=True),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("check_at", sa.BigInteger(), nullable=True),
        sa.Column("checkpoint", sa.Text(), nullable=True),
        sa.Column("progress", sa.Text(), nullable=True),
        sa.Column("output", sa.Text(), nullable=True),
        sa.Column("output_lease", IDENTIFIER, nullable=True),
        sa.Column("pending_logs", sa.Text(), nullable=True),
        sa.Column("log_lines", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    _create_index("ix_task_cancelling", ["organization_id"], "state = 'cancel_requested'")
    _create_index("ix_task_check", ["check_at"], "check_at IS NOT NULL")
    _create_index("ix_task_limited", ["concurrency_key", "is_fresh", "rank", "id"], "state = 'limited'")
    _create_index("ix_task_open", ["execution_id"], "ended_at IS NULL")
    op.create_index("ix_task_organization", "task", ["organization_id", "created_at", "id"], unique=False)
    _create_index(
        "ix_task_placed",
        ["concurrency_key"],
        "concurrency_key IS NOT NULL AND state IN ('ready', 'leased', 'cancel_requested')",
    )
    _create_index(
        "ix_task_ready", ["organization_id", "queue", "queue_turn", "is_fresh", "rank"], "state = 'ready'"
    )
    _create_index(
        "ix_task_worker", ["organization_id", "worker_id"], "state IN ('leased', 'cancel_requested')"
    )
    op.create_index("uq_task_node", "task", ["execution_id", "node_id", "iteration"], unique=True)


def _create_workers() -> None:
    """Create the table of workers."""
    op.create_table(
        "task_worker",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("name", IDENTIFIER, nullable=False),
        sa.Column("sdk", IDENTIFIER, nullable=False),
        sa.Column("types", sa.Text(), nullable=False),
        sa.Column("pools", sa.Text(), nullable=False),
        sa.Column("key_id", IDENTIFIER, nullable=False),
        sa.Column("is_draining", sa.Boolean(), nullable=False),
        sa.Column("first_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("stopped_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("organization_id", "id"),
    )
    op.create_index("ix_task_worker_seen", "task_worker", ["organization_id", "last_seen_at"], unique=False)


def _create_index(name: str, columns: list[str], condition: str) -> None:
    """Create an index of some of the tasks."""
    where = sa.text(condition)
    op.create_index(name, "task", columns, unique=False, postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    """Drop the tables and the column."""
    op.drop_table("task_worker")
    op.drop_table("task")
    # In place: a new copy of the table would have the same columns but not the same definition.
    op.drop_column("api_key", "node_types")
