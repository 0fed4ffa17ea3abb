"""Hash of the definition of each version, by which runs have the number of their version.

Revision ID: 0059
Revises: 0058
"""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import op

from json_text import decoding

revision = "0059"
down_revision = "0058"
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
DEFAULT_SETTINGS = {"timeout": 3600, "retryOnFailure": False, "maxRetries": 3, "parallelism": 16}
"""Settings that runs had in their definitions at this revision where a workflow had none."""
HASHED_VERSIONS = 20
"""Newest versions of each workflow that get the hash: the runs of older ones are mostly deleted by now."""
BATCH = 500


def upgrade() -> None:
    """Add the column, fill it for the newest versions of each workflow, and create the index."""
    op.add_column("workflow_version", sa.Column("definition_hash", IDENTIFIER, nullable=True))
    _fill_hashes()
    op.create_index(
        "ix_workflow_version_definition",
        "workflow_version",
        ["workflow_id", "definition_hash", "created_at", "version"],
    )


def _fill_hashes() -> None:
    """Store the hashes of the newest 20 versions of each workflow, whose snapshots are read workflow by workflow.

    Versions with node types of an organization, or with its default model, get hashes that none of their runs has.
    """
    connection = op.get_bind()
    snapshots = sa.text(
        "SELECT version, snapshot FROM workflow_version WHERE workflow_id = :id AND version > :above"
    )
    fill = sa.text(
        "UPDATE workflow_version SET definition_hash = :hash WHERE workflow_id = :id AND version = :version"
    )
    for workflow in _list_workflows(connection):
        above = workflow.version - HASHED_VERSIONS
        found = connection.execute(snapshots, {"id": workflow.id, "above": above}).all()
        hashes = [
            {"hash": _hash_definition(row.snapshot), "id": workflow.id, "version": row.version}
            for row in found
        ]
        if hashes:
            connection.execute(fill, hashes)


def _list_workflows(connection: sa.Connection) -> Iterator[sa.Row[Any]]:
    """Yield id and newest version of every workflow, 500 at a time."""
    page = sa.text("SELECT id, version FROM workflow WHERE id > :last ORDER BY id LIMIT :limit")
    last = ""
    while rows := connection.execute(page, {"last": last, "limit": BATCH}).all():
        yield from rows
        last = rows[-1].id


def _hash_definition(snapshot: str) -> str:
    """Return the hash that runs of a snapshot have: that of nodes, connections and settings as canonical JSON."""
    version = decoding.decode(snapshot)
    definition = {
        "nodes": version["nodes"],
        "connections": version["connections"],
        "settings": {**DEFAULT_SETTINGS, **version["settings"]},
    }
    return sha256(msgspec.json.encode(definition, order="sorted")).hexdigest()


def downgrade() -> None:
    """Drop the index and the column."""
    op.drop_index("ix_workflow_version_definition", "workflow_version")
    op.drop_column("workflow_version", "definition_hash")
