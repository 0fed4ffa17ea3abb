"""Requests, addresses and changes of audit entries.

Revision ID: 0046
Revises: 0045
"""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString

revision = "0046"
down_revision = "0045"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, empty in existing rows, whose chain hashes stay valid."""
    op.add_column("audit_entry", sa.Column("request_id", AutoString(), nullable=True))
    op.add_column("audit_entry", sa.Column("address_hash", AutoString(), nullable=True))
    op.add_column("audit_entry", sa.Column("changes", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the columns; the chain hashes of entries that have them don't hold any more."""
    op.drop_column("audit_entry", "changes")
    op.drop_column("audit_entry", "address_hash")
    op.drop_column("audit_entry", "request_id")
