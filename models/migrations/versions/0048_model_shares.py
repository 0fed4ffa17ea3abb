"""Shares of language models with single users.

Revision ID: 0048
Revises: 0047
"""

import sqlalchemy as sa
from alembic import op

revision = "0048"
down_revision = "0047"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "ai_model_share",
        sa.Column("model_id", IDENTIFIER, nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("shared_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["ai_model.id"]),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"]),
        sa.PrimaryKeyConstraint("model_id", "user_id"),
    )
    op.create_index("ix_ai_model_share_user", "ai_model_share", ["user_id"], unique=False)


def downgrade() -> None:
    """Drop the table."""
    op.drop_index("ix_ai_model_share_user", "ai_model_share")
    op.drop_table("ai_model_share")
