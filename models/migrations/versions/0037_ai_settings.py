"""Settings of organizations for language models, with the budget of a month.

Revision ID: 0037
Revises: 0036
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, and add organization and month to charges."""
    op.create_table(
        "ai_settings",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("month_budget", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        sa.PrimaryKeyConstraint("organization_id"),
    )
    op.add_column("model_charge", sa.Column("organization_id", IDENTIFIER, nullable=True))
    op.add_column("model_charge", sa.Column("month", sa.Integer(), nullable=True))
    op.create_index(
        "ix_model_charge_reserved",
        "model_charge",
        ["organization_id", "month"],
        unique=False,
        postgresql_where=sa.text("NOT is_settled"),
        sqlite_where=sa.text("NOT is_settled"),
    )


def downgrade() -> None:
    """Drop the table and the columns."""
    op.drop_index("ix_model_charge_reserved", "model_charge")
    op.drop_column("model_charge", "month")
    op.drop_column("model_charge", "organization_id")
    op.drop_table("ai_settings")
