"""Hourly counts of calls of language models, and the results of their tests.

Revision ID: 0051
Revises: 0050
"""

import sqlalchemy as sa
from alembic import op

revision = "0051"
down_revision = "0050"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
AMOUNTS = ("calls", "unpriced_calls", "input_tokens", "output_tokens", "cost")


def upgrade() -> None:
    """Create the table with its index, and add the column."""
    op.create_table(
        "model_hour",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("model_id", IDENTIFIER, nullable=False),
        sa.Column("starts_at", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("error", IDENTIFIER, nullable=False),
        sa.Column("bucket", sa.SmallInteger(), autoincrement=False, nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in AMOUNTS),
        sa.PrimaryKeyConstraint("organization_id", "model_id", "starts_at", "error", "bucket"),
    )
    op.create_index("ix_model_hour_starts_at", "model_hour", ["starts_at"])
    op.add_column("ai_model", sa.Column("last_test", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the column, and the table with its index."""
    op.drop_column("ai_model", "last_test")
    op.drop_table("model_hour")
