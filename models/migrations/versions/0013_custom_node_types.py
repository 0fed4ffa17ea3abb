"""Custom node types.

Revision ID: 0013
Revises: 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "custom_node_type",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("type", IDENTIFIER, nullable=False),
        sa.Column("version", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("is_deprecated", sa.Boolean(), nullable=False),
        sa.Column("created_by", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "type", "version"),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("custom_node_type")
