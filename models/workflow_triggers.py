"""The triggers of workflows' graphs once more, one a row, so that what arrives finds the workflows that it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Column, Index, SmallInteger
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn

MAX_PATTERNS: Final = 100
"""Of one trigger: a draft may name more, which never becomes active."""
_EXACT_MATCH_ONLY: Final = frozenset({"github.ping"})
_PATTERN: Final = re.compile(r"[^\s*]{1,200}(?:\.\*)?\Z")


class TriggerKind(StrEnum):
    """What starts a run without naming its workflow's graph; manual triggers and the API's have no rows."""

    QUEUE = "queue"
    EMAIL = "email"
    EVENT = "event"
    SCHEDULE = "schedule"
    WEBHOOK = "webhook"


class WorkflowTrigger(SQLModel, table=True):
    """A trigger node, as it stands in its workflow's graph.

    There is a row whatever the workflow's status, and for templates too: whoever asks joins it with the workflow's own.
    """

    __tablename__ = "workflow_trigger"

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    node_id: str = Field(primary_key=True)
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    kind: str
    config: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """As it is stored: without the defaults of the node type."""
    revision: int
    """Of the workflow, when its triggers were last written."""


class WorkflowTriggerMatch(SQLModel, table=True):
    """A type of events that starts a workflow, or with `.*` at its end all that begin so."""

    __tablename__ = "workflow_trigger_match"
    __table_args__ = (Index("ix_workflow_trigger_match_pattern", "organization_id", "pattern"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    node_id: str = Field(primary_key=True)
    pattern: str = Field(primary_key=True)
    organization_id: str


def parse_patterns(config: Mapping[str, Any]) -> Sequence[str]:
    """Return what an event trigger matches, each once; what is no pattern in a draft's config is left out."""
    given = config.get("event_type")
    listed = given if isinstance(given, list) else [given]
    patterns = (each for each in listed if isinstance(each, str) and _PATTERN.match(each))
    return list(dict.fromkeys(patterns))[:MAX_PATTERNS]


def matching_patterns(event_type: str) -> Sequence[str]:
    """Return all patterns that match a type of events: `a.b` is matched by `a.b` and `a.*`, never by `*`.

    `github.ping` is matched by itself alone: GitHub sends it when a webhook is made, and nothing has happened.
    """
    if event_type in _EXACT_MATCH_ONLY:
        return [event_type]
    parts = event_type.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
    return [event_type, *(f"{prefix}.*" for prefix in prefixes if prefix)]
