"""Span that started an execution.

Revision ID: 0015
  Revises: 0014
"""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("execution", sa.Column("trace_origin", AutoString(), nullable=True))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("execution", "trace_origin")
