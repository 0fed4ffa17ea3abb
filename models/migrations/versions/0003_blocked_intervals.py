"""Blocked intervals of runs, and the presence of workers.

Revision ID: 0003
  Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the tables `blocked_interval` and `worker_presence`."""
    op.create_table(
        "blocked_interval",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("code", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("resumed_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("execution_id", "started_at"),
    )
    is_open = sa.text("ended_at IS NULL")
    op.create_index(
        "ix_blocked_interval_open",
        "blocked_interval",
        ["organization_id", "code"],
        unique=False,
        postgresql_where=is_open,
        sqlite_where=is_open,
    )
    op.create_table(
        "worker_presence",
        sa.Column("owner", IDENTIFIER, nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column("held_runs", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("owner"),
    )


def downgrade() -> None:
    """Drop the tables `blocked_interval` and `worker_presence`."""
    op.drop_table("worker_presence")
    op.drop_index("ix_blocked_interval_open", "blocked_interval")
    op.drop_table("blocked_interval")
