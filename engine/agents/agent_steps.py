"""Steps of agents in the journal: each answer of a model and each tool call, complete for a continuation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Final

import msgspec

from engine.model_calls import ModelCallRecord

AGENT_TYPE: Final = "agent"
"""Node type whose visits have steps."""


class StepKind(StrEnum):
    """Kind of a step."""

    MODEL = "model"
    TOOL = "tool"


class StepStatus(StrEnum):
    """State of a step."""

    STARTED = "started"
    """Recorded before it is done; its outcome is unknown if the worker was lost."""
    WAITING = "waiting"
    """Tool call that a person has to approve; it has not begun."""
    COMPLETED = "completed"
    FAILED = "failed"
    """For a model: no answer yet, it is asked again. For a tool: the model gets the error."""


class AgentStep(msgspec.Struct, frozen=True):
    """Record of one step of an agent; a later row of the same number replaces an earlier one."""

    node_id: str
    iteration: str
    number: int
    """Position among the steps of the node, from 0."""
    sequence: int
    """Sequence number, shared with the spans and log lines of the run."""
    kind: StepKind
    name: str
    """Id of the model that answered, or name of the tool."""
    status: StepStatus
    started_at: datetime
    ended_at: datetime | None = None
    attempt: int = 1
    losses: int = 0
    """Attempts with an unknown outcome, since their worker was lost; of a tool call, those of the agent that did it."""
    effect: str | None = None
    """Effect of a tool."""
    call_id: str = ""
    """Id of a tool call, by which the model knows its result."""
    key: str = ""
    """Idempotency key of a tool call, the same in all attempts."""
    request_hash: str = ""
    """SHA-256 in hexadecimal: of the request to a model, or of a tool call that needs an approval."""
    arguments: bytes | None = None
    """JSON of the arguments of a tool call."""
    result: bytes | None = None
    """JSON: a model's answer as `engine.agents.agent.StoredAnswer`, or the text that the model gets from a tool."""
    model_calls: Sequence[ModelCallRecord] = ()
    """Calls of language models in this step, with their costs."""
