"""Node that lets a language model work on a task with tools, in steps that are recorded one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec.structs import replace

from engine import content_recording
from engine.agents import agent
from engine.agents.agent import AgentLimits, AgentTask, AgentTool, ApprovalPolicy
from engine.agents.agent_steps import StepKind
from engine.model_calls import ChatMessage, MessageRole, ToolDescription, ToolMode, sum_cost, sum_usage
from engine.model_prices import show_cost
from engine.node_api import NodeEffect
from engine.run_errors import NodeError
from nodes import config_fields
from nodes.ai import agent_loop, structured_answers

if TYPE_CHECKING:
    from engine.agents.agent import Finish
    from engine.model_prices import ModelPrice
    from engine.node_api import CallableTool, NodeCall, StepPause, StepWait
    from engine.values import Json

NANOS_PER_DOLLAR = 1_000_000_000
APPROVAL_SECONDS = 604_800
LONGEST_APPROVAL_SECONDS = 31_536_000
ANSWER_RULE = "When you are done, answer with a JSON value alone that fits this JSON Schema:"


async def run(call: NodeCall) -> Json | StepPause | StepWait:
    config = call.config
    model = call.tools.render_model_config()
    model_ids = _list_models(config, model)
    task = _build_task(call, config, model, await call.tools.list_tools())
    if task.limits.max_cost is not None:
        task = replace(task, prices=await _read_prices(call, model_ids))
    ended = await agent_loop.run_agent(call, task, model_ids)
    if not isinstance(ended, agent.Finish):
        return ended
    return _build_output(call, task, ended)


def _list_models(config: Mapping[str, Json], model: Mapping[str, Json]) -> list[str]:
    """Return the ids of the models to ask in turn: that of `model`, the rendered config of the node at the port `ai`
    (empty without one), or else of `config`, and then the fallbacks of `model`.

    Raises `NodeError` if neither names a model.
    """
    named = model if model.get("model") else config
    if not named.get("model"):
        message = "The agent needs a model: connect an `llm` to its port `ai`, or set `model`"
        raise NodeError(message, code="missing-config")
    fallbacks = config_fields.read_sequence(model, "fallbackModelIds") if model else ()
    return [str(named["model"]), *map(str, fallbacks)]


async def _read_prices(call: NodeCall, model_ids: Sequence[str]) -> list[ModelPrice]:
    """Return the prices of the models that an agent may ask, by which its budget is checked before each request.

    Raises `NodeError` for a model without a price, which could spend any amount.
    """
    prices = []
    for model_id in model_ids:
        price = await call.services.models.read_price(call.caller, model_id)
        if price is None:
            message = f"{model_id}: a budget with maxCost needs the price of the model"
            raise NodeError(message, code="model-price-unknown")
        prices.append(price)
    return prices


def _build_task(
    call: NodeCall,
    config: Mapping[str, Json],
    model: Mapping[str, Json],
    connected: Sequence[CallableTool],
) -> AgentTask:
    if not call.records_content:
        _require_repeatable(config, connected)
    schema = config.get("outputSchema")
    if schema is not None and not isinstance(schema, dict):
        raise NodeError("`outputSchema` has to be a JSON Schema", code="invalid-config")
    tools = _select_tools(call, config, connected)
    rules = [str(text) for text in (model.get("system"), config.get("system")) if text]
    if schema is not None and tools:
        rules.append(f"{ANSWER_RULE}\n{msgspec.json.encode(schema).decode()}")
    system = [ChatMessage(MessageRole.SYSTEM, "\n\n".join(rules))] if rules else []
    approvers = cast("Mapping[str, Json]", config.get("approvers") or {})
    temperature = config.get("temperature", model.get("temperature"))
    return AgentTask(
        messages=[*system, ChatMessage(MessageRole.USER, config_fields.read_text(config, "prompt"))],
        tools=tools,
        limits=_read_limits(config),
        max_answer_tokens=int(config_fields.read_number(config, "maxTokens", minimum=1, maximum=1_000_000)),
        temperature=float(temperature) if isinstance(temperature, int | float) else None,
        output_schema=schema,
        tool_mode=ToolMode(str(config["toolMode"])),
        is_tainted=call.tools.has_tainted_input,
        approvers=approvers,
        approval_seconds=config_fields.read_number(
            {"expiresInSeconds": APPROVAL_SECONDS, **approvers},
            "expiresInSeconds",
            minimum=1,
            maximum=LONGEST_APPROVAL_SECONDS,
        ),
        read_answer=lambda text: _read_answer(text, schema or {}),
    )


def _require_repeatable(config: Mapping[str, Json], tools: Sequence[CallableTool]) -> None:
    """Raise `NodeError` for an agent whose contents are not recorded, if it may write or must ask people about its
    calls.

    Its conversation may begin again; then it would repeat writes, and could not read the answers of people. Validation
    of a workflow finds that too, except in values of expressions.
    """
    field = content_recording.FIELD
    if NodeEffect.WRITE.value in config_fields.read_sequence(config, "effects"):
        message = f"An agent with `{field}: false` may not write: let nodes behind it do that"
        raise NodeError(message, code=content_recording.REFUSED_CODE)
    if ApprovalPolicy.ALWAYS in [config["approval"], *(tool.approval for tool in tools)]:
        message = f"An agent with `{field}: false` can't ask about its calls: a question keeps the arguments"
        raise NodeError(message, code=content_recording.REFUSED_CODE)


def _read_answer(text: str, schema: Mapping[str, Any]) -> tuple[Json, Sequence[str]]:
    found = structured_answers.read_answer(text, schema)
    return found.value, found.problems


def _select_tools(
    call: NodeCall, config: Mapping[str, Json], connected: Sequence[CallableTool]
) -> dict[str, AgentTool]:
    """Return the tools among `connected` that the config enables (all without a list) and whose effects it allows, by
    name.

    Before the first step, logs a warning for each tool with an effect that is not allowed. Raises `NodeError` for an
    invalid config.
    """
    allowed = {NodeEffect.PURE.value, *map(str, config_fields.read_sequence(config, "effects"))}
    enabled = config.get("enabledTools")
    for tool in connected if not call.steps.recorded else ():
        if tool.effect.value not in allowed:
            call.log("warning", f"The agent may only read, and does not get the tool {tool.name}: it writes")
    return {
        tool.name: AgentTool(
            ToolDescription(tool.name, tool.description, tool.parameters),
            tool.effect,
            _build_checker(tool.parameters),
            tool.is_repeated,
            ApprovalPolicy(str(tool.approval or config["approval"])),
            tool.fingerprint,
            tool.is_untrusted,
            tool.is_agent,
            tool.is_paid,
            tool.asks_about_unknown,
        )
        for tool in connected
        if tool.effect.value in allowed and (not isinstance(enabled, list) or tool.name in enabled)
    }


def _build_checker(parameters: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Sequence[str]]:
    """Return a function that returns the problems of a call's arguments by the JSON Schema `parameters`."""
    return lambda arguments: structured_answers.find_problems(dict(arguments), parameters)


def _read_limits(config: Mapping[str, Json]) -> AgentLimits:
    budget = cast("Mapping[str, Json]", config.get("budget") or {})
    most_tokens, most_cost = budget.get("maxTokens"), budget.get("maxCost")

    def count(name: str, minimum: int, maximum: int) -> int:
        return int(config_fields.read_number(config, name, minimum=minimum, maximum=maximum))

    return AgentLimits(
        max_iterations=count("maxIterations", 1, agent.MAX_ITERATIONS),
        max_tool_calls=count("maxToolCalls", 0, 1_000),
        max_tokens=None if most_tokens is None else int(cast("float", most_tokens)),
        max_cost=None if most_cost is None else _read_dollars(most_cost),
        parallel_tools=count("parallelTools", 1, 4),
        fails_at_limit=config.get("onLimit") == "error",
    )


def _read_dollars(given: Json) -> int:
    """Return a decimal text in dollars as nano-dollars; raises `NodeError` for another value."""
    try:
        return int(Decimal(str(given)) * NANOS_PER_DOLLAR)
    except (InvalidOperation, ValueError, OverflowError):
        message = "`budget.maxCost` has to be an amount of dollars, such as `0.25`"
        raise NodeError(message, code="invalid-config") from None


def _build_output(call: NodeCall, task: AgentTask, ended: Finish) -> Json:
    """Return the output of the node: the answer, the conversation if it is recorded, the steps and their cost."""
    steps = call.steps.recorded
    messages = agent.build_conversation(task, steps) if call.records_content else ()
    records = [record for step in steps for record in step.model_calls]
    return {
        "response": ended.text,
        **({} if task.output_schema is None else {"data": ended.value}),
        "stopReason": ended.stop_reason.value,
        "messages": [cast("Json", _show_message(message)) for message in messages],
        "steps": [
            {
                "kind": step.kind.value,
                "name": step.name
                if call.records_content
                else content_recording.limit_name(step.kind, step.name, task.tools),
                "status": step.status.value,
                "attempt": step.attempt,
            }
            for step in steps
        ],
        "toolCalls": sum(step.kind is StepKind.TOOL for step in steps),
        "lostAttempts": sum(step.losses for step in steps),
        "usage": msgspec.to_builtins(sum_usage(records)),
        "cost": show_cost(sum_cost(records)),
    }


def _show_message(message: ChatMessage) -> dict[str, object]:
    shown: dict[str, object] = {"role": message.role.value, "content": message.content}
    if message.tool_calls:
        shown["toolCalls"] = [
            {"id": call.id, "name": call.name, "arguments": call.arguments} for call in message.tool_calls
        ]
    if message.tool_call_id:
        shown["toolCallId"] = message.tool_call_id
    return shown
