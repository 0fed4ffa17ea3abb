"""Index of private runs that have not ended.

Revision ID: 0055
Revises: 0054
"""

import sqlalchemy as sa
from alembic import op

revision = "0055"
down_revision = "0054"
branch_labels = None
depends_on = None

LIVE_PRIVATE = sa.text("is_private AND ended_at IS NULL")


def upgrade() -> None:
    """Create the index, which counts of unfinished runs read to leave private ones out."""
    op.create_index(
        "ix_execution_private",
        "execution",
        ["organization_id"],
        postgresql_where=LIVE_PRIVATE,
        sqlite_where=LIVE_PRIVATE,
    )


def downgrade() -> None:
    """Drop the index."""
    op.drop_index("ix_execution_private", "execution")
