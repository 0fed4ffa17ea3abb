"""Table of workflows that were applied from files.

Revision ID: 0021
  Revises: 0020
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "applied_workflow",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("set_name", IDENTIFIER, nullable=False),
        sa.Column("content_hash", IDENTIFIER, nullable=False),
        sa.Column("status", IDENTIFIER, nullable=True),
        sa.Column("applied_by", IDENTIFIER, nullable=False),
        sa.Column("applied_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["workflow_id"], ["workflow.id"]),
        sa.PrimaryKeyConstraint("workflow_id"),
    )
    op.create_index(
        "ix_applied_workflow_set", "applied_workflow", ["organization_id", "set_name"], unique=False
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_index("ix_applied_workflow_set", "applied_workflow")
    op.drop_table("applied_workflow")
