"""Mark of failed runs that were redriven or purged, and mutes of groups of dead letters.

Revision ID: 0025
  Revises: 0024
"""

from hashlib import sha256

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
BATCH = 500


def upgrade() -> None:
    """Add the column with its index, mark the runs that were settled before, and create the table."""
    op.add_column("execution", sa.Column("settled_at", sa.BigInteger(), nullable=True))
    _mark_settled()
    is_open = sa.text("status = 'failed' AND settled_at IS NULL")
    op.create_index(
        "ix_execution_unsettled",
        "execution",
        ["organization_id", "created_at", "id"],
        unique=False,
        postgresql_where=is_open,
        sqlite_where=is_open,
    )
    op.create_table(
        "dead_letter_mute",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("group_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("muted_by", IDENTIFIER, nullable=False),
        sa.Column("muted_at", sa.BigInteger(), nullable=False),
        sa.Column("ends_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        sa.PrimaryKeyConstraint("organization_id", "group_id"),
    )


def _mark_settled() -> None:
    """Mark failed runs whose redrive key is used; the key's scope is a hash of the workflow's id."""
    connection = op.get_bind()
    used = sa.text(
        "SELECT e.id, e.workflow_id, i.scope FROM idempotency i JOIN execution e ON e.id = i.key"
        " WHERE e.shard = i.shard AND e.status = 'failed'"
    )
    settled = [
        {"id": row.id}
        for row in connection.execute(used)
        if row.scope == sha256(f"settled\n{row.workflow_id}".encode()).hexdigest()
    ]
    mark = sa.text("UPDATE execution SET settled_at = updated_at WHERE id = :id")
    for start in range(0, len(settled), BATCH):
        connection.execute(mark, settled[start : start + BATCH])


def downgrade() -> None:
    """Drop the table, the index and the column."""
    op.drop_table("dead_letter_mute")
    op.drop_index("ix_execution_unsettled", "execution")
    op.drop_column("execution", "settled_at")
