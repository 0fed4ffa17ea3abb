"""Histogram of the times in the queue, beside those of runs and wakes.

Revision ID: 0050
Revises: 0049
"""

import sqlalchemy as sa
from alembic import op

revision = "0050"
down_revision = "0049"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the leading scheduler fills it as it counts the hours again."""
    op.add_column("run_hour", sa.Column("queue_times", sa.Text(), nullable=False, server_default="{}"))


def downgrade() -> None:
    """Remove the column."""
    op.drop_column("run_hour", "queue_times")
