"""Delay each run to the rate limit of its key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.node_api import TimerWait
from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAX_LIMIT: Final = 100_000
MIN_SECONDS: Final = 0.1
MAX_SECONDS: Final = 86_400
MAX_WAIT_SECONDS: Final = 604_800
MAX_KEY_LENGTH: Final = 200


async def run(call: NodeCall) -> Json | TimerWait:
    place = await call.services.throttle.reserve(
        call.caller,
        _throttle_key(call),
        limit=int(config_fields.read_number(call.config, "limit", minimum=1, maximum=MAX_LIMIT)),
        per_seconds=config_fields.read_number(
            call.config, "perSeconds", minimum=MIN_SECONDS, maximum=MAX_SECONDS
        ),
        max_wait_seconds=config_fields.read_number(
            call.config, "maxWaitSeconds", minimum=0, maximum=MAX_WAIT_SECONDS
        ),
    )
    return call.data if place <= call.now else TimerWait(place, output=call.data)


def _throttle_key(call: NodeCall) -> str:
    """Return the key of the rate limit: the key in the config, which all workflows of the organization share, or else a
    key of this node alone.

    Prefixes keep both kinds apart. Raises `NodeError` for a key that is empty, over 200 characters, or has a NUL.
    """
    if "key" not in call.config:
        return f"node:{call.caller.workflow_id}:{call.node_id}"
    key = config_fields.read_text(call.config, "key")
    if not 1 <= len(key) <= MAX_KEY_LENGTH or "\0" in key:
        message = f"`key` must have 1 to {MAX_KEY_LENGTH} characters, and no NUL"
        raise NodeError(message, code="invalid-config")
    return f"key:{key}"
