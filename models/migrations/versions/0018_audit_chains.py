"""Hash chains of audit entries, and versions of workers.

Revision ID: 0018
  Revises: 0017
"""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, empty in existing rows, and the indexes; the scheduler chains earlier entries."""
    op.add_column("audit_entry", sa.Column("sequence", sa.BigInteger(), nullable=True))
    op.add_column("audit_entry", sa.Column("chain_hash", AutoString(), nullable=True))
    op.create_index("ix_audit_entry_chain", "audit_entry", ["organization_id", "sequence"], unique=True)
    is_unchained = sa.text("chain_hash IS NULL")
    op.create_index(
        "ix_audit_entry_unchained",
        "audit_entry",
        ["organization_id"],
        unique=False,
        postgresql_where=is_unchained,
        sqlite_where=is_unchained,
    )
    op.add_column("worker_presence", sa.Column("version", AutoString(), nullable=True))


def downgrade() -> None:
    """Drop the indexes and the columns."""
    op.drop_column("worker_presence", "version")
    op.drop_index("ix_audit_entry_unchained", "audit_entry")
    op.drop_index("ix_audit_entry_chain", "audit_entry")
    op.drop_column("audit_entry", "chain_hash")
    op.drop_column("audit_entry", "sequence")
