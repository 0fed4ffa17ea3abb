"""Host, event loop and start of the processes of the server.

Revision ID: 0031
  Revises: 0030
"""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

TABLES = ("process_presence", "worker_presence")


def upgrade() -> None:
    """Add the columns."""
    for table in TABLES:
        op.add_column(table, sa.Column("host", AutoString(), nullable=True))
        op.add_column(table, sa.Column("loop_lag_ms", sa.Integer(), server_default="0", nullable=False))
    op.add_column("process_presence", sa.Column("started_at", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Drop the columns."""
    op.drop_column("process_presence", "started_at")
    for table in reversed(TABLES):
        op.drop_column(table, "loop_lag_ms")
        op.drop_column(table, "host")
