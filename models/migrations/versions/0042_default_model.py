"""Default language model of an organization.

Revision ID: 0042
Revises: 0041
"""

import sqlalchemy as sa
from alembic import op

revision = "0042"
down_revision = "0041"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("ai_settings", sa.Column("default_model_id", sa.String(), nullable=True))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("ai_settings", "default_model_id")
