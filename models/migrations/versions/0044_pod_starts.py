"""Start of the pod that an interval of waking has waited for.

Revision ID: 0044
Revises: 0043
"""

import sqlalchemy as sa
from alembic import op

revision = "0044"
down_revision = "0043"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, which older intervals leave empty."""
    op.add_column("blocked_interval", sa.Column("pod_started_at", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Remove the column."""
    op.drop_column("blocked_interval", "pod_started_at")
