"""Completion actions: columns of runs are called as the glossary calls their contents.

Renames in place and in constant time, without copying or changing rows. Code of revision 0010 cannot use
the table afterwards.

Revision ID: 0011
  Revises: 0010
"""

from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

COLUMNS = {
    "follow_up": "completion_action",
    "follow_up_at": "completion_due_at",
    "follow_up_outcome": "completion_outcome",
}


def upgrade() -> None:
    """Rename the columns of completion actions and their index to the new names, and refuse older code."""
    _rename(COLUMNS, "ix_execution_follow_up", "ix_execution_completion")
    _support_from(revision)


def downgrade() -> None:
    """Rename the columns of completion actions and their index to the old names."""
    _rename({new: old for old, new in COLUMNS.items()}, "ix_execution_completion", "ix_execution_follow_up")
    _support_from("0002")


def _rename(names: Mapping[str, str], old_index: str, new_index: str) -> None:
    # In place: a new copy of the table could not replace it while rows of other tables refer to it.
    with op.batch_alter_table("execution", recreate="never") as batch:
        for old, new in names.items():
            batch.alter_column(old, new_column_name=new)
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER INDEX {old_index} RENAME TO {new_index}")
        return
    action, due_at, _ = names.values()
    op.drop_index(old_index, "execution")
    op.create_index(
        new_index,
        "execution",
        [due_at, "ended_at"],
        unique=False,
        sqlite_where=sa.text(f"{action} IS NOT NULL AND ended_at IS NOT NULL"),
    )


def _support_from(oldest_revision: str) -> None:
    """Store the oldest revision of code that may use the tables; older code refuses them."""
    op.execute(sa.text("UPDATE schema_support SET oldest_revision = :it").bindparams(it=oldest_revision))
