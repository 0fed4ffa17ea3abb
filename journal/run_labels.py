"""Tags and metadata of runs: by the settings of their workflow, by their nodes, and copied to repetitions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from sqlalchemy import insert, literal, select
from sqlmodel import col

from engine.expressions import ExpressionError, compile_template
from engine.values import value_as_text
from models.execution import ExecutionData
from models.execution_label import ExecutionLabel

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.store import ExecutionKey

RunLabel: TypeAlias = tuple[str, str]
"""Key and value of metadata, or `models.execution_label.TAG_KEY` and a tag."""

METADATA_KEY: Final = re.compile(r"[a-z][A-Za-z0-9_-]{0,39}\Z")
"""Form of the keys of metadata."""
MAX_VALUE_CHARACTERS: Final = 256


def read_settings_metadata(settings: Mapping[str, Json], trigger: Json) -> Sequence[RunLabel]:
    """Return the metadata that `settings.metadata` of a workflow gives its run: key and value from the
    trigger's output.

    Entries whose path finds nothing, or no text, number or truth value, are left out. Values are cut to 256
    characters.
    """
    metadata = settings.get("metadata")
    if not isinstance(metadata, dict):
        return ()
    labels: list[RunLabel] = []
    for key, expression in metadata.items():
        unresolved: list[str] = []
        try:
            value = compile_template(expression).render({"trigger": trigger}, unresolved)
        except ExpressionError:
            continue
        if not unresolved and isinstance(value, str | int | float | bool):
            labels.append((key, value_as_text(value).replace("\0", "")[:MAX_VALUE_CHARACTERS]))
    return labels


async def insert_labels(connection: AsyncConnection, run: ExecutionKey, labels: Sequence[RunLabel]) -> None:
    """Insert the labels (tags, and metadata with keys) of a new run whose `ExecutionData` is stored; without
    that, none is inserted.
    """
    for key, value in labels:
        selected = select(
            col(ExecutionData.execution_id),
            literal(key).label("key"),
            literal(value).label("value"),
            *(col(ExecutionData.shard), col(ExecutionData.organization_id), col(ExecutionData.created_at)),
        ).where(col(ExecutionData.execution_id) == run.execution_id, col(ExecutionData.shard) == run.shard)
        await connection.execute(insert(ExecutionLabel).from_select(_COLUMNS, selected))


async def copy_labels(connection: AsyncConnection, origin: ExecutionKey, new_id: str) -> None:
    """Copy the labels of a run to a repetition of it; if it has labels, the `ExecutionData` of the repetition must be
    stored.
    """
    new_time = select(col(ExecutionData.created_at)).where(
        col(ExecutionData.execution_id) == new_id, col(ExecutionData.shard) == origin.shard
    )
    selected = select(
        literal(new_id).label("execution_id"),
        *(col(ExecutionLabel.key), col(ExecutionLabel.value)),
        *(col(ExecutionLabel.shard), col(ExecutionLabel.organization_id)),
        new_time.scalar_subquery(),
    ).where(
        col(ExecutionLabel.execution_id) == origin.execution_id, col(ExecutionLabel.shard) == origin.shard
    )
    await connection.execute(insert(ExecutionLabel).from_select(_COLUMNS, selected))


_COLUMNS: Final = ("execution_id", "key", "value", "shard", "organization_id", "created_at")
