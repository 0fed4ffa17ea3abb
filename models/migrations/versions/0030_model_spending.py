"""Tables of charges of language models, and of their costs by month.

Revision ID: 0030
  Revises: 0029
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "model_charge",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("key", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("root_id", IDENTIFIER, nullable=False),
        sa.Column("node", IDENTIFIER, nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=True),
        sa.Column("is_settled", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id", "key"),
    )
    op.create_index("ix_model_charge_root", "model_charge", ["root_id"], unique=False)
    op.create_table(
        "model_cost",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("month", sa.Integer(), nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("model_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("unpriced_calls", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "month", "workflow_id", "model_id"),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("model_cost")
    op.drop_index("ix_model_charge_root", "model_charge")
    op.drop_table("model_charge")
