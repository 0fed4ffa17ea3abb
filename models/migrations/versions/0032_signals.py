"""Tables of signals to runs, and of the nodes that wait for them.

Revision ID: 0032
  Revises: 0031
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "signal",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("name", IDENTIFIER, nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=True),
        sa.Column("iteration", IDENTIFIER, nullable=True),
        sa.Column("delivered_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("execution_id", "number"),
    )
    op.create_index(
        "ix_signal_unread",
        "signal",
        ["execution_id", "number"],
        unique=False,
        postgresql_where=sa.text("delivered_at IS NULL"),
        sqlite_where=sa.text("delivered_at IS NULL"),
    )
    op.create_table(
        "signal_wait",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("name", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration"),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("signal_wait")
    op.drop_index("ix_signal_unread", "signal")
    op.drop_table("signal")
