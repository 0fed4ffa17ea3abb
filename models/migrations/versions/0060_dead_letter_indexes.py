"""Indexes of the dead letters of a workflow and of a kind of trigger.

Revision ID: 0060
Revises: 0059
"""

import sqlalchemy as sa
from alembic import op

revision = "0060"
down_revision = "0059"
branch_labels = None
depends_on = None

COLUMNS = {"workflow": "workflow_id", "trigger": "trigger_type"}


def upgrade() -> None:
    """Create the indexes, of failed runs of inbound requests alone: few of all runs."""
    is_dead_letter = sa.text(
        "status = 'failed' AND settled_at IS NULL"
        " AND trigger_type IN ('queue', 'email', 'event', 'webhook', 'schedule')"
    )
    for name, column in COLUMNS.items():
        op.create_index(
            f"ix_execution_dead_{name}",
            "execution",
            ["organization_id", column, "created_at", "id"],
            postgresql_where=is_dead_letter,
            sqlite_where=is_dead_letter,
        )


def downgrade() -> None:
    """Drop the indexes."""
    for name in COLUMNS:
        op.drop_index(f"ix_execution_dead_{name}", "execution")
