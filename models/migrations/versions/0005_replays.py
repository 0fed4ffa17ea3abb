"""Replays: the run that each one replays, and the results that it reuses.

Revision ID: 0005
  Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
COLUMNS = {"execution": ("replay_of", "write_key_id"), "span": ("reused_from", "key_id")}


def upgrade() -> None:
    """Add the columns of replays, empty in existing rows, to executions and spans, and an index of replays."""
    for table, names in COLUMNS.items():
        for name in names:
            op.add_column(table, sa.Column(name, IDENTIFIER, nullable=True))
    is_replay = sa.text("replay_of IS NOT NULL")
    op.create_index(
        "ix_execution_replayed",
        "execution",
        ["replay_of"],
        unique=False,
        postgresql_where=is_replay,
        sqlite_where=is_replay,
    )


def downgrade() -> None:
    """Drop the columns of replays from executions and spans, and the index."""
    op.drop_index("ix_execution_replayed", "execution")
    for table, names in COLUMNS.items():
        for name in names:
            op.drop_column(table, name)
