"""Tables of the broker over PostgreSQL.

Revision ID: 0008
  Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables `broker_message` and `rate_bucket`.

    On PostgreSQL they are not logged, because nothing in them must outlive a crash.
    """
    op.create_table(
        "broker_message",
        sa.Column("queue", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("queue", "key"),
    )
    op.create_index("ix_broker_message_created", "broker_message", ["queue", "created_at"], unique=False)
    op.create_table(
        "rate_bucket",
        sa.Column("bucket", sa.String(), nullable=False),
        sa.Column("full_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("bucket"),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE broker_message SET UNLOGGED")
        op.execute("ALTER TABLE rate_bucket SET UNLOGGED")


def downgrade() -> None:
    """Drop the tables `broker_message` and `rate_bucket`."""
    op.drop_table("rate_bucket")
    op.drop_index("ix_broker_message_created", table_name="broker_message")
    op.drop_table("broker_message")
