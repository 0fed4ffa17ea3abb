"""Index by which the replays of a line of executions are found.

Revision ID: 0010
  Revises: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the index of executions by key, by which the replays of one line are found."""
    is_replay = sa.text("replay_of IS NOT NULL")
    op.create_index(
        "ix_execution_line",
        "execution",
        ["key_id"],
        unique=False,
        postgresql_where=is_replay,
        sqlite_where=is_replay,
    )


def downgrade() -> None:
    """Drop the index of executions by key."""
    op.drop_index("ix_execution_line", "execution")
