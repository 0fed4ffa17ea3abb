"""Indexes for the filters of the audit trail, and for decisions of all workflows of an organization.

Revision ID: 0047
Revises: 0046
"""

from alembic import op

revision = "0047"
down_revision = "0046"
branch_labels = None
depends_on = None

AUDIT_COLUMNS = {"user": "user_id", "key": "key_id", "request": "request_id", "address": "address_hash"}
DECISION_COLUMNS = {"action": "action", "reason": "reason", "user": "user_id"}


def upgrade() -> None:
    """Add the indexes."""
    for name, column in AUDIT_COLUMNS.items():
        op.create_index(f"ix_audit_entry_{name}", "audit_entry", ["organization_id", column, "created_at"])
    op.create_index("ix_lifecycle_decision_organization", "lifecycle_decision", ["organization_id", "at"])
    for name, column in DECISION_COLUMNS.items():
        op.create_index(
            f"ix_lifecycle_decision_{name}", "lifecycle_decision", ["organization_id", column, "at"]
        )


def downgrade() -> None:
    """Drop the indexes."""
    for name in ("organization", *DECISION_COLUMNS):
        op.drop_index(f"ix_lifecycle_decision_{name}", "lifecycle_decision")
    for name in AUDIT_COLUMNS:
        op.drop_index(f"ix_audit_entry_{name}", "audit_entry")
