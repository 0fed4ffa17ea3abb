"""Index of the runs that were taken back from lost workers, by time.

Revision ID: 0058
Revises: 0057
"""

import sqlalchemy as sa
from alembic import op

revision = "0058"
down_revision = "0057"
branch_labels = None
depends_on = None

INDEX = "ix_blocked_interval_lost"


def upgrade() -> None:
    """Create the index."""
    condition = sa.text("code = 'worker-lost'")
    op.create_index(
        INDEX,
        "blocked_interval",
        ["organization_id", "ended_at"],
        postgresql_where=condition,
        sqlite_where=condition,
    )


def downgrade() -> None:
    """Drop the index."""
    op.drop_index(INDEX, "blocked_interval")
