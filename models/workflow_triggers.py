"""Copies of the triggers in workflow graphs, one row each, for the look-up of workflows by inbound requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Column, Index, SmallInteger
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn

MAX_PATTERNS: Final = 100
"""Maximum number of patterns of one trigger; a draft may have more, and can't become active then."""
_EXACT_MATCH_ONLY: Final = frozenset({"github.ping"})
_PATTERN: Final = re.compile(r"[^\s*]{1,200}(?:\.\*)?\Z")


class TriggerKind(StrEnum):
    """Kind of trigger that has a row; manual triggers and those of the API have none."""

    QUEUE = "queue"
    EMAIL = "email"
    EVENT = "event"
    SCHEDULE = "schedule"
    WEBHOOK = "webhook"


class WorkflowTrigger(SQLModel, table=True):
    """Trigger node of a workflow's graph.

    There is a row for any status of the workflow, and for templates; readers join it with the workflow's row.
    """

    __tablename__ = "workflow_trigger"

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    node_id: str = Field(primary_key=True)
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    kind: str
    config: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """Config as stored, without the defaults of the node type."""
    revision: int
    """Revision of the workflow at the last write of its triggers."""


class WorkflowTriggerMatch(SQLModel, table=True):
    """Event type that starts a workflow, or a prefix that ends in `.*`."""

    __tablename__ = "workflow_trigger_match"
    __table_args__ = (Index("ix_workflow_trigger_match_pattern", "organization_id", "pattern"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    node_id: str = Field(primary_key=True)
    pattern: str = Field(primary_key=True)
    organization_id: str


def parse_patterns(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the event types and prefixes (`a.*`) in the config of an event trigger, without duplicates.

    Invalid patterns, which a draft may have, and all after the first 100 are left out.
    """
    given = config.get("event_type")
    listed = given if isinstance(given, list) else [given]
    patterns = (each for each in listed if isinstance(each, str) and _PATTERN.match(each))
    return list(dict.fromkeys(patterns))[:MAX_PATTERNS]


def matching_patterns(event_type: str) -> Sequence[str]:
    """Return all patterns that match an event type: `a.b` is matched by `a.b` and `a.*`, never by `*`.

    `github.ping` is matched only by itself: GitHub sends it when a webhook is created, not for a change in a
    repository.
    """
    if event_type in _EXACT_MATCH_ONLY:
        return [event_type]
    parts = event_type.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
    return [event_type, *(f"{prefix}.*" for prefix in prefixes if prefix)]
