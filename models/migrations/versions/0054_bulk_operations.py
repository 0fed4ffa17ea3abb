"""Bulk operations with their progress.

Revision ID: 0054
Revises: 0053
"""

import sqlalchemy as sa
from alembic import op

revision = "0054"
down_revision = "0053"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table with its indexes."""
    op.create_table(
        "bulk_operation",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        *(sa.Column(name, IDENTIFIER, nullable=False) for name in ("user_id", "key_id", "action")),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("selection", "options")),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("total", "per_second")),
        sa.Column("first_alone", sa.Boolean(), nullable=False),
        sa.Column("status", IDENTIFIER, nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("done", "refused")),
        sa.Column("refusals", sa.Text(), nullable=False),
        sa.Column("first_execution_id", IDENTIFIER, nullable=True),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("cursor_at", sa.BigInteger(), nullable=True),
        sa.Column("cursor_id", IDENTIFIER, nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("leased_until", "created_at")),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        *(
            sa.Column(name, IDENTIFIER, nullable=True)
            for name in ("end_reason", "request_id", "address_hash")
        ),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_bulk_operation_organization", "bulk_operation", ["organization_id", "created_at"])
    is_open = sa.text("ended_at IS NULL")
    op.create_index(
        "ix_bulk_operation_open",
        "bulk_operation",
        ["leased_until"],
        postgresql_where=is_open,
        sqlite_where=is_open,
    )


def downgrade() -> None:
    """Drop the table with its indexes."""
    op.drop_table("bulk_operation")
