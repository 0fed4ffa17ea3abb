"""Calls of language models in spans.

Revision ID: 0023
  Revises: 0022
"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column `model_calls` to spans."""
    op.add_column("span", sa.Column("model_calls", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the column `model_calls` of spans."""
    op.drop_column("span", "model_calls")
