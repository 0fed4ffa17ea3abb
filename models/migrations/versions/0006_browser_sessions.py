"""Sessions of browsers, and new scopes for keys that may do everything.

Revision ID: 0006
  Revises: 0005
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
EARLIER_SCOPES = (
    "datasources:read",
    "datasources:write",
    "keys:write",
    "users:write",
    "workflows:execute",
    "workflows:read",
    "workflows:write",
)
NEW_SCOPES = ("models:read", "models:write", "nodes:write", "tasks:work")


def upgrade() -> None:
    """Create the table `browser_session`, and add the new scopes to keys that have all earlier ones."""
    op.create_table(
        "browser_session",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("key_id", IDENTIFIER, nullable=False),
        sa.Column("user_agent", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_browser_session_hash", "browser_session", ["hash"], unique=True)
    op.create_index(
        "ix_browser_session_organization", "browser_session", ["organization_id", "created_at"], unique=False
    )
    op.create_index("ix_browser_session_last_seen", "browser_session", ["last_seen_at"], unique=False)
    _replace_scopes(EARLIER_SCOPES, (*EARLIER_SCOPES, *NEW_SCOPES))


def downgrade() -> None:
    """Drop the table `browser_session`, and remove the new scopes from keys that have all."""
    _replace_scopes((*EARLIER_SCOPES, *NEW_SCOPES), EARLIER_SCOPES)
    op.drop_index("ix_browser_session_last_seen", "browser_session")
    op.drop_index("ix_browser_session_organization", "browser_session")
    op.drop_index("ix_browser_session_hash", "browser_session")
    op.drop_table("browser_session")


def _replace_scopes(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Replace the scopes of keys that have exactly the old ones. Every release stores them in this order."""
    statement = sa.text("UPDATE api_key SET scopes = :new WHERE scopes = :old")
    op.execute(statement.bindparams(old=_as_stored(old), new=_as_stored(new)))


def _as_stored(scopes: tuple[str, ...]) -> str:
    return json.dumps(sorted(scopes), separators=(",", ":"))
