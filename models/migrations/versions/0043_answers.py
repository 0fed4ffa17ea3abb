"""Answers of people in lists: id, organization and title of the question.

Revision ID: 0043
Revises: 0042
"""

import sqlalchemy as sa
from alembic import op

revision = "0043"
down_revision = "0042"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Add the columns and the index for lists of answers."""
    op.add_column("approval_vote", sa.Column("id", IDENTIFIER, nullable=True))
    op.add_column("approval_vote", sa.Column("organization_id", IDENTIFIER, nullable=True))
    op.add_column("approval_vote", sa.Column("title", sa.Text(), nullable=True))
    op.create_index("ix_approval_vote_organization", "approval_vote", ["organization_id", "created_at", "id"])


def downgrade() -> None:
    """Drop the index and the columns."""
    op.drop_index("ix_approval_vote_organization", "approval_vote")
    op.drop_column("approval_vote", "title")
    op.drop_column("approval_vote", "organization_id")
    op.drop_column("approval_vote", "id")
