"""Earliest start of the run of a deferred delivery.

Revision ID: 0049
Revises: 0048
"""

import sqlalchemy as sa
from alembic import op

revision = "0049"
down_revision = "0048"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, empty for deliveries that have arrived before."""
    op.add_column("delivery", sa.Column("not_before", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("delivery", "not_before")
