"""Time until which a user keeps a deployment awake.

Revision ID: 0056
Revises: 0055
"""

import sqlalchemy as sa
from alembic import op

revision = "0056"
down_revision = "0055"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Add the columns, empty for deployments that nobody keeps awake."""
    op.add_column("deployment", sa.Column("kept_awake_since", sa.BigInteger(), nullable=True))
    op.add_column("deployment", sa.Column("kept_awake_until", sa.BigInteger(), nullable=True))
    op.add_column("deployment", sa.Column("kept_awake_by", IDENTIFIER, nullable=True))


def downgrade() -> None:
    """Drop the columns."""
    for name in ("kept_awake_by", "kept_awake_until", "kept_awake_since"):
        op.drop_column("deployment", name)
