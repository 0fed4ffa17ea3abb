"""Times until which providers of language models accept no calls.

Revision ID: 0027
  Revises: 0026
"""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column `blocked_until` to models."""
    op.add_column("ai_model", sa.Column("blocked_until", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Drop the column `blocked_until` of models."""
    op.drop_column("ai_model", "blocked_until")
