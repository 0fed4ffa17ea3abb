"""Rendered configs of all nodes.

Revision ID: 0007
  Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column `rendered_config` to spans."""
    op.add_column("span", sa.Column("rendered_config", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the column `rendered_config` of spans."""
    op.drop_column("span", "rendered_config")
