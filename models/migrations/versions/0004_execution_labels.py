"""Tags and metadata of runs, and indexes for lists of live and unsuccessful runs.

Revision ID: 0004
  Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
LIVE = sa.text("status IN ('pending', 'running', 'waiting')")
UNSUCCESSFUL = sa.text("status IN ('failed', 'stopped', 'cancelled')")


def upgrade() -> None:
    """Create the table `execution_label`, and the indexes by which lists find runs."""
    op.create_table(
        "execution_label",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("key", IDENTIFIER, nullable=False),
        sa.Column("value", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id", "key", "value"),
    )
    op.create_index(
        "ix_execution_label_value",
        "execution_label",
        ["organization_id", "key", "value", "created_at", "execution_id"],
        unique=False,
    )
    for name, condition in (("live", LIVE), ("unsuccessful", UNSUCCESSFUL)):
        op.create_index(
            f"ix_execution_{name}",
            "execution",
            ["organization_id", "status", "created_at", "id"],
            unique=False,
            postgresql_where=condition,
            sqlite_where=condition,
        )


def downgrade() -> None:
    """Drop the table `execution_label`, and the indexes by which lists find runs."""
    op.drop_index("ix_execution_unsuccessful", "execution")
    op.drop_index("ix_execution_live", "execution")
    op.drop_index("ix_execution_label_value", "execution_label")
    op.drop_table("execution_label")
