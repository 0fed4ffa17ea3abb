"""Approvals: requests, links and votes.

Revision ID: 0009
  Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the tables `approval_request`, `approval_link` and `approval_vote`."""
    op.create_table(
        "approval_request",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration"),
    )
    is_due = sa.text("due_at IS NOT NULL")
    op.create_index(
        "ix_approval_request_due",
        "approval_request",
        ["due_at"],
        unique=False,
        postgresql_where=is_due,
        sqlite_where=is_due,
    )
    op.create_table(
        "approval_link",
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("assignee", IDENTIFIER, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("hash"),
    )
    op.create_index("ix_approval_link_execution", "approval_link", ["execution_id"], unique=False)
    op.create_table(
        "approval_vote",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("voter", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("choice", IDENTIFIER, nullable=True),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration", "voter"),
    )


def downgrade() -> None:
    """Drop the tables `approval_request`, `approval_link` and `approval_vote`."""
    op.drop_table("approval_vote")
    op.drop_index("ix_approval_link_execution", "approval_link")
    op.drop_table("approval_link")
    op.drop_index("ix_approval_request_due", "approval_request")
    op.drop_table("approval_request")
