"""Use that a replay makes of recorded steps of agents.

Revision ID: 0041
Revises: 0040
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0041"
down_revision = "0040"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("execution_step", sa.Column("reuse", IDENTIFIER, nullable=True))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("execution_step", "reuse")
