"""Index of the nodes that wait for input of a person.

Revision ID: 0029
  Revises: 0028
"""

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the index."""
    awaits_input = sa.text('awaits LIKE \'%"kind":"input"%\'')
    op.create_index(
        "ix_span_input",
        "span",
        ["shard", "execution_id"],
        unique=False,
        postgresql_where=awaits_input,
        sqlite_where=awaits_input,
    )


def downgrade() -> None:
    """Drop the index."""
    op.drop_index("ix_span_input", "span")
