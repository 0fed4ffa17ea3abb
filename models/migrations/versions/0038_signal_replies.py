"""Replies of nodes to signals.

Revision ID: 0038
  Revises: 0037
"""

import sqlalchemy as sa
from alembic import op

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("signal", sa.Column("reply", sa.Text(), nullable=True))
    op.add_column("signal", sa.Column("replied_at", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Drop the columns."""
    op.drop_column("signal", "replied_at")
    op.drop_column("signal", "reply")
