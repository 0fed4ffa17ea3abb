"""Implementation of custom node types: a task for a worker of the organization, and a wait for its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine import values
from engine.expressions import ExpressionError, compile_template
from engine.node_api import AnswerSource, AnswerWait, NodeEffect
from engine.run_errors import NodeError

if TYPE_CHECKING:
    from engine.expressions import ValueTemplate
    from engine.graph import GraphNode
    from engine.node_api import NodeCall, NodeType, RunNode, TaskRules
    from engine.node_lookup import NodeTypeLookup

MAX_INLINE_BYTES: Final = 262_144
"""Size of an input that a claim contains; a worker reads a larger one by a request of its own."""
MAX_KEY_CHARACTERS: Final = 200
SHOWN_PROBLEMS: Final = 5


class NewTask(msgspec.Struct, frozen=True, omit_defaults=True):
    """Task as its node describes it, stored in the commit of the node's wait."""

    type: str
    version: str
    content_hash: str
    pool: str
    key: str
    """Idempotency key of the node."""
    config: msgspec.Raw
    input: msgspec.Raw
    """`null` if it is too large for a claim; the span of the node has it."""
    input_bytes: int
    timeout_seconds: float
    lease_seconds: float
    max_attempts: int
    first_delay_seconds: float
    max_delay_seconds: float
    delay_grows: bool = True
    concurrency_key: str | None = None
    concurrency_limit: int | None = None
    start_timeout_seconds: float | None = None
    is_write: bool = False
    is_at_most_once: bool = False

    @property
    def has_input(self) -> bool:
        """Whether the task itself has its input: at most 256 KiB; a larger one is read from the run."""
        return self.input_bytes <= MAX_INLINE_BYTES


_encode = msgspec.json.Encoder().encode


def build_runner(node: GraphNode, node_type: NodeType, catalog: NodeTypeLookup) -> RunNode:
    """Return the function of a custom node: it returns the wait for a new task that a worker performs.

    The function raises `NodeError` for an invalid rendered config, and for a concurrency key that can't be rendered.
    Raises `ExpressionError` for an invalid concurrency key, `ValueError` for a type that is no custom type.
    """
    rules = node_type.task
    if rules is None:
        raise ValueError(f"{node_type.type} is no custom type")
    key = compile_template(rules.concurrency_key) if rules.concurrency_limit is not None else None
    limits = _limits_of(node, rules)

    def run(call: NodeCall) -> AnswerWait:
        """Return the wait for a new task with the config and input of the call; `NodeError` for an invalid config."""
        config = dict(call.config)
        problems = catalog.rendered_config_problems(node_type, config)
        if problems:
            shown = "; ".join(f"{problem.path}: {problem.message}" for problem in problems[:SHOWN_PROBLEMS])
            raise NodeError(f"The rendered config is invalid: {shown}", code="invalid-config")
        given = values.encode_json(call.data)
        task = NewTask(
            type=node_type.type,
            version=node_type.version,
            content_hash=node_type.content_hash,
            pool=rules.pool,
            key=call.idempotency_key,
            config=msgspec.Raw(values.encode_json(config)),
            input=msgspec.Raw(given if len(given) <= MAX_INLINE_BYTES else b"null"),
            input_bytes=len(given),
            concurrency_key=None if key is None else _render_key(key, call, node_type.type),
            concurrency_limit=rules.concurrency_limit,
            is_write=node_type.effect.of(config) is NodeEffect.WRITE,
            is_at_most_once=node.at_most_once and node_type.effect.of(config) is NodeEffect.WRITE,
            **limits,
        )
        request: dict[str, Any] = {
            "type": node_type.type,
            "version": node_type.version,
            "pool": rules.pool,
        }
        return AnswerWait(AnswerSource.TASK, request=request, task=_encode(task))

    return run


def _limits_of(node: GraphNode, rules: TaskRules) -> dict[str, Any]:
    """Return the timeouts, delays and attempts of a task: a timeout or a retry policy of the node itself replaces that
    of its type.
    """
    limits: dict[str, Any] = {
        "timeout_seconds": node.timeout_seconds or rules.timeout_seconds,
        "lease_seconds": rules.lease_seconds,
        "start_timeout_seconds": rules.start_timeout_seconds,
        "max_attempts": rules.max_attempts,
        "first_delay_seconds": rules.first_delay_seconds,
        "max_delay_seconds": rules.max_delay_seconds,
        "delay_grows": rules.delay_grows,
    }
    if node.has_own_retry:
        limits |= {
            "max_attempts": node.retry.max_attempts,
            "first_delay_seconds": node.retry.backoff_seconds,
            "max_delay_seconds": node.retry.max_delay_seconds,
            "delay_grows": True,
        }
    return limits


def _render_key(key: ValueTemplate, call: NodeCall, type_name: str) -> str:
    """Return the concurrency key of a task: its type, a colon, and the rendered key of the type's rules, cut
    to 200 characters.

    Raises `NodeError` if the key can't be rendered.
    """
    try:
        rendered = key.render(call.scope, call.unresolved)
    except ExpressionError as error:
        raise NodeError(f"task.concurrency.key: {error}", code="expression-error") from error
    text = rendered if isinstance(rendered, str) else values.encode_json(rendered).decode()
    return f"{type_name}:{text[:MAX_KEY_CHARACTERS]}"
