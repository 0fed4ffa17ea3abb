"""Activity of processes, and an index of the last wakes.

Revision ID: 0045
Revises: 0044
"""

import sqlalchemy as sa
from alembic import op

revision = "0045"
down_revision = "0044"
branch_labels = None
depends_on = None

TABLES = ("process_presence", "worker_presence")
INDEX = "ix_blocked_interval_waking"


def upgrade() -> None:
    """Add the columns, and create the index."""
    for table in TABLES:
        op.add_column(table, sa.Column("activity", sa.Text(), nullable=True))
    condition = sa.text("code = 'waking'")
    op.create_index(
        INDEX, "blocked_interval", ["started_at"], postgresql_where=condition, sqlite_where=condition
    )


def downgrade() -> None:
    """Drop the index, and remove the columns."""
    op.drop_index(INDEX, "blocked_interval")
    for table in TABLES:
        op.drop_column(table, "activity")
