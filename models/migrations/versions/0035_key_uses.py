"""Last route and address of API keys, and counts of the requests that lacked a scope.

Revision ID: 0035
  Revises: 0034
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, and create the table."""
    op.add_column("api_key", sa.Column("last_route", sa.String(), nullable=True))
    op.add_column("api_key", sa.Column("last_address_hash", sa.String(), nullable=True))
    op.create_table(
        "key_refusal",
        sa.Column("day", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("key_id", IDENTIFIER, nullable=False),
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.BigInteger(), nullable=False),
        sa.Column("last_route", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("day", "key_id", "scope"),
    )


def downgrade() -> None:
    """Drop the table and the columns."""
    op.drop_table("key_refusal")
    op.drop_column("api_key", "last_address_hash")
    op.drop_column("api_key", "last_route")
