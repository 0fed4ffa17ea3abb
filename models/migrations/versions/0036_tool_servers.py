"""Tools of tool servers.

Revision ID: 0036
Revises: 0035
"""

import sqlalchemy as sa
from alembic import op

revision = "0036"
down_revision = "0035"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column `tools` to data sources."""
    op.add_column("data_source", sa.Column("tools", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the column `tools` of data sources."""
    op.drop_column("data_source", "tools")
