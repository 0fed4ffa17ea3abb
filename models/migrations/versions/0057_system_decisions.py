"""Decisions of the system about data.

Revision ID: 0057
Revises: 0056
"""

import sqlalchemy as sa
from alembic import op

revision = "0057"
down_revision = "0056"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table with its indexes."""
    op.create_table(
        "system_decision",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        *(sa.Column(name, IDENTIFIER, nullable=False) for name in ("action", "reason")),
        sa.Column("inputs", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    for name, columns in (
        ("organization", ["organization_id", "at"]),
        ("workflow", ["organization_id", "workflow_id", "at"]),
        ("action", ["organization_id", "action", "at"]),
    ):
        op.create_index(f"ix_system_decision_{name}", "system_decision", columns)


def downgrade() -> None:
    """Drop the table with its indexes."""
    op.drop_table("system_decision")
