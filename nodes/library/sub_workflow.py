"""Start a run of another workflow, once per node and iteration, and optionally wait for its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.node_api import AnswerSource, AnswerWait
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json | AnswerWait:
    is_awaited = config_fields.read_flag(call.config, "wait")
    execution_id = await call.services.runs.start(
        call.caller,
        config_fields.read_text(call.config, "workflowId"),
        call.config.get("inputs", call.data),
        node_id=call.node_id,
        iteration=call.iteration,
        awaited=is_awaited,
    )
    started: Json = {"executionId": execution_id}
    return AnswerWait(AnswerSource.RUN, request=started) if is_awaited else started
