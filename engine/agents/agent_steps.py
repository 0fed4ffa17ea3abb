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
    """Tool call that a person has to decide about: it has not begun, or its outcome is unknown."""
    COMPLETED = "completed"
    FAILED = "failed"
    """For a model: no answer yet, it is asked again. For a tool: the model gets the error."""


class StepReuse(StrEnum):
    """Use that a replay makes of a step of the run that it replays."""

    CANDIDATE = "candidate"
    """Not yet part of this run: it is taken over if the request to the model is the same, and else left out."""
    GUARDED = "guarded"
    """As a candidate, but the agent fails if a tool behind it may have had an effect."""
    BINDING = "binding"
    """As a candidate, but the agent fails at another request."""
    REUSED = "reused"
    """Taken over by this run."""


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
    """Of a tool call above 1 once a person was asked about an unknown outcome: that question counts as an attempt."""
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
    reuse: StepReuse | None = None
    """Use of a step of a replayed run; None for a step of this run."""
    conversation: int | None = None
    """Number of its conversation, from 0, if its contents are not recorded, so that no other worker continues behind
    it; None if they are.
    """

    @property
    def has_unknown_outcome(self) -> bool:
        """Whether a person is asked about the outcome of a tool call, which may have been made."""
        return self.status is StepStatus.WAITING and self.attempt > 1

    @property
    def is_candidate(self) -> bool:
        """Whether the step belongs to the replayed run, and is not yet part of this one."""
        return self.reuse is not None and self.reuse is not StepReuse.REUSED


def list_current_steps(steps: Sequence[AgentStep]) -> Sequence[AgentStep]:
    """Return the steps of the current conversation: those after the last step whose contents are not recorded."""
    for index in range(len(steps), 0, -1):
        if steps[index - 1].conversation is not None:
            return steps[index:]
    return steps


def count_conversations(steps: Sequence[AgentStep]) -> int:
    """Return the number of earlier conversations, those whose contents are not recorded."""
    return max((step.conversation + 1 for step in steps if step.conversation is not None), default=0)
