"""Hourly groups of failed runs by cause.

Revision ID: 0052
Revises: 0051
"""

import sqlalchemy as sa
from alembic import op

revision = "0052"
down_revision = "0051"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table, which the scheduler fills with the failed runs of the last 24 hours."""
    op.create_table(
        "failure_hour",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("fingerprint", IDENTIFIER, nullable=False),
        sa.Column("starts_at", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=True),
        sa.Column("code", IDENTIFIER, nullable=False),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("first_at", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.BigInteger(), nullable=False),
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "fingerprint", "starts_at"),
    )
    op.create_index("ix_failure_hour_starts_at", "failure_hour", ["starts_at"])


def downgrade() -> None:
    """Drop the table with its index."""
    op.drop_table("failure_hour")
