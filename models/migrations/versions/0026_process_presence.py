"""Presence of gateways, schedulers and deployers.

Revision ID: 0026
  Revises: 0025
"""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "process_presence",
        sa.Column("owner", AutoString(), nullable=False),
        sa.Column("role", AutoString(), nullable=False),
        sa.Column("version", AutoString(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_process_presence")),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("process_presence")
