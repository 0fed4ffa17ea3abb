"""Deadline of the start of a deployment, and counts of fixes by `pilotflame doctor`.

Revision ID: 0016
  Revises: 0015
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, empty in existing rows, and the table."""
    op.add_column("deployment", sa.Column("start_deadline_at", sa.BigInteger(), nullable=True))
    op.create_table(
        "drift_fix_count",
        sa.Column("drift_class", sa.String(), nullable=False),
        sa.Column("fixed", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("drift_class", name=op.f("pk_drift_fix_count")),
    )


def downgrade() -> None:
    """Drop the table and the column."""
    op.drop_table("drift_fix_count")
    op.drop_column("deployment", "start_deadline_at")
