"""Wait for a signal to the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine import answer_payloads
from engine.node_api import AnswerSource, AnswerWait, NodeResult
from engine.services import SignalRequest
from nodes import config_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.node_api import NodeCall
    from engine.values import Json

TIMEOUT_PORT: Final = "timeout"
EMPTY_SIGNAL: Final[Mapping[str, Json]] = {"name": None, "payload": None, "by": None, "at": None}
LONGEST_SECONDS: Final = 31_536_000


async def run(call: NodeCall) -> AnswerWait | NodeResult:
    name = config_fields.read_text(call.config, "name")
    timeout_seconds = None
    if "timeoutSeconds" in call.config:
        timeout_seconds = config_fields.read_number(
            call.config, "timeoutSeconds", minimum=1, maximum=LONGEST_SECONDS
        )
    expected = await call.services.signals.expect(
        call.caller, SignalRequest(name, timeout_seconds), node_id=call.node_id, iteration=call.iteration
    )
    if expected.answer is not None:
        return answer_payloads.decode_answer(expected.answer)
    return AnswerWait(
        AnswerSource.SIGNAL,
        request={"name": name},
        expires_at=expected.expires_at,
        expired=NodeResult(dict(EMPTY_SIGNAL), port=TIMEOUT_PORT),
    )
