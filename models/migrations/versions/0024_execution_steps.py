"""Table of the steps of agents.

Revision ID: 0024
  Revises: 0023
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table `execution_step`."""
    op.create_table(
        "execution_step",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", IDENTIFIER, nullable=False),
        sa.Column("name", IDENTIFIER, nullable=False),
        sa.Column("status", IDENTIFIER, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("effect", IDENTIFIER, nullable=True),
        sa.Column("call_id", IDENTIFIER, nullable=False),
        sa.Column("key", IDENTIFIER, nullable=False),
        sa.Column("request_hash", IDENTIFIER, nullable=False),
        sa.Column("arguments", sa.Text(), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("model_calls", sa.Text(), nullable=True),
        sa.Column("cost", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration", "number"),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("execution_step")
