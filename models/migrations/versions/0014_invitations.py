"""Invitations: links that make a user.

Revision ID: 0014
  Revises: 0013
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "invitation",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("email", IDENTIFIER, nullable=False),
        sa.Column("role", IDENTIFIER, nullable=False),
        sa.Column("invited_by", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("accepted_at", sa.BigInteger(), nullable=True),
        sa.Column("user_id", IDENTIFIER, nullable=True),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_invitation_hash", "invitation", ["hash"], unique=True)
    op.create_index(
        "ix_invitation_organization", "invitation", ["organization_id", "created_at"], unique=False
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_index("ix_invitation_organization", "invitation")
    op.drop_index("ix_invitation_hash", "invitation")
    op.drop_table("invitation")
