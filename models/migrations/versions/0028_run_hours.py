"""Table of hourly counts of runs, and the index of an organization's deployments.

Revision ID: 0028
  Revises: 0027
"""

import sqlalchemy as sa
from alembic import op

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, which the scheduler fills with the runs of the last 24 hours, and the index."""
    op.create_table(
        "run_hour",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("starts_at", sa.BigInteger(), nullable=False),
        sa.Column("accepted", sa.Integer(), nullable=False),
        sa.Column("completed", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("stopped", sa.Integer(), nullable=False),
        sa.Column("cancelled", sa.Integer(), nullable=False),
        sa.Column("run_times", sa.Text(), nullable=False),
        sa.Column("wake_times", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "workflow_id", "starts_at"),
    )
    op.create_index("ix_run_hour_starts_at", "run_hour", ["starts_at"], unique=False)
    op.create_index(
        "ix_deployment_organization", "deployment", ["organization_id", "workflow_id"], unique=False
    )


def downgrade() -> None:
    """Drop the index and the table."""
    op.drop_index("ix_deployment_organization", "deployment")
    op.drop_index("ix_run_hour_starts_at", "run_hour")
    op.drop_table("run_hour")
