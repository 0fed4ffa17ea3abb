"""Recording of contents: the records of a node with `recordContent: false` in its config have ids, counts and hashes.

The process that works on the run has the contents in memory. No other one can continue behind such a record, so it
begins the node again. The output of the node is kept like that of any node, since the nodes behind it need it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import structs
from msgspec.structs import replace

from engine.agents.agent_steps import AgentStep, StepKind
from engine.run_records import LOST_ATTEMPT_CODE, TIMEOUT_CODE, NodeSpan, RunError

if TYPE_CHECKING:
    from engine.model_calls import ModelCallRecord
    from engine.values import Json

    AddLine: TypeAlias = Callable[[str, str, str], None]

FIELD: Final = "recordContent"
TYPES: Final = frozenset(
    {"agent", "ai-gateway", "classifier", "extract", "llm", "llm-router", "tool"},
)
"""Types of nodes that have the field."""
REFUSED_CODE: Final = "content-not-recorded"
"""Code of a config that needs recorded contents."""
HIDDEN_LINE: Final = "The text of this line is not recorded (recordContent)"
UNNAMED: Final = "unknown"
"""Name in place of that of a tool that a model has made up, which may be any text."""
SHOWN_CONFIG: Final = b'{"recordContent":false}'
OPEN_CODES: Final = frozenset(
    {
        *(LOST_ATTEMPT_CODE, TIMEOUT_CODE, REFUSED_CODE, "missing-config", "unresolved-mapping"),
        "agent-limit",
        *("model-budget-exceeded", "month-budget-exceeded", "model-price-unknown", "model-not-found"),
    }
)
"""Codes of errors whose messages never quote a prompt, an answer or a provider."""


def is_recorded(node_type: str, config: Mapping[str, Json]) -> bool:
    """Return whether the contents of a node are recorded: unless its type calls models, or is a tool, and its config in
    the definition has `recordContent` set to false.
    """
    return node_type not in TYPES or config.get(FIELD) is not False


def hide_lines(log: AddLine) -> AddLine:
    """Return a replacement for `log` that adds lines with a fixed text in place of their messages."""
    return lambda level, _message, node_id: log(level, HIDDEN_LINE, node_id)


def strip_span(span: NodeSpan) -> NodeSpan:
    """Return the record of a node without its prompt: neither its config nor an input that was built for it."""
    return structs.replace(span, input=None, resolved_config=None, rendered_config=SHOWN_CONFIG)


def strip_calls(calls: Sequence[ModelCallRecord]) -> list[ModelCallRecord]:
    """Return the records of calls of models without the texts of answers."""
    return [structs.replace(call, text=None) for call in calls]


def strip_step(step: AgentStep, conversation: int, tools: Collection[str]) -> AgentStep:
    """Return the record of a step of an agent without contents, with the number of its conversation.

    `conversation` is that number if the step has none yet, and `tools` are the names of the agent's tools.
    """
    return structs.replace(
        step,
        name=limit_name(step.kind, step.name, tools),
        call_id="",
        arguments=None,
        result=None,
        model_calls=tuple(strip_calls(step.model_calls)),
        conversation=conversation if step.conversation is None else step.conversation,
    )


def limit_name(kind: StepKind, name: str, tools: Collection[str]) -> str:
    """Return the name of a step: of a model, or of a tool if it is among `tools`; else `unknown`.

    A model may have made up any other name.
    """
    return name if kind is StepKind.MODEL or name in tools else UNNAMED


def strip_error(error: RunError) -> RunError:
    """Return the error of a node without its cause, and without a message that may quote a prompt or an answer.

    Messages stay for codes whose messages never quote them.
    """
    if error.code in OPEN_CODES:
        return replace(error, cause=None)
    message = f"The node failed ({error.code}), and the message of the error is not recorded ({FIELD})"
    return replace(error, message=message, cause=None)
