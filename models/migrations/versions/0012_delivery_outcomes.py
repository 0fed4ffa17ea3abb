"""Index by which deliveries that were not accepted are found, and lists by it.

Revision ID: 0012
  Revises: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the index."""
    is_unusual = sa.text("outcome <> 'accepted'")
    op.create_index(
        "ix_delivery_outcome",
        "delivery",
        ["organization_id", "outcome", "created_at", "id"],
        unique=False,
        postgresql_where=is_unusual,
        sqlite_where=is_unusual,
    )


def downgrade() -> None:
    """Drop the index."""
    op.drop_index("ix_delivery_outcome", "delivery")
