"""Log levels of workflows for a limited time.

Revision ID: 0017
  Revises: 0016
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "workflow_log_level",
        sa.Column("workflow_id", sa.String(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("workflow_id", name=op.f("pk_workflow_log_level")),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("workflow_log_level")
