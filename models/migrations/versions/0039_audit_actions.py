"""Index for the audit entries of an action.

Revision ID: 0039
Revises: 0038
"""

from alembic import op

revision = "0039"
down_revision = "0038"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the index."""
    op.create_index("ix_audit_entry_action", "audit_entry", ["organization_id", "action", "created_at"])


def downgrade() -> None:
    """Drop the index."""
    op.drop_index("ix_audit_entry_action", "audit_entry")
