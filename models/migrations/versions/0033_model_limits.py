"""Limits of language models.

Revision ID: 0033
Revises: 0032
"""

import sqlalchemy as sa
from alembic import op

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column `limits` to models."""
    op.add_column("ai_model", sa.Column("limits", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the column `limits` of models."""
    op.drop_column("ai_model", "limits")
