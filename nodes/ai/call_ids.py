"""Ids of the tool calls in a request: unique ones of nine letters and digits, whichever model has made the calls.

Templates of Mistral's models accept no others, and Anthropic refuses a conversation in which two calls have the same
id, as those of servers without ids have. So an agent may continue the conversation of another provider's model.
"""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from engine.model_calls import ChatMessage

_ACCEPTED: Final = re.compile(r"[A-Za-z0-9]{9}")


def unify(messages: Sequence[ChatMessage], model_id: str) -> Sequence[ChatMessage]:
    """Return messages in which tool calls have unique ids that every provider accepts, and their results name the same
    ids.

    Accepted ids stay unless another call has them, and so do ids in content of the called model's own form, which may
    be signed. The beginning of a conversation has the same ids in each of its requests, so that caches of prompts hold.
    """
    own = [message for message in messages if _is_own(message, model_id)]
    taken = {call.id for message in own for call in message.tool_calls}
    numbers = count()
    renamed: dict[str, str] = {}
    """Ids of the last answer with calls, by those that its results name."""
    unified = []
    for message in messages:
        if message.tool_call_id:
            called = renamed.get(message.tool_call_id, message.tool_call_id)
            unified.append(msgspec.structs.replace(message, tool_call_id=called))
            continue
        if message.tool_calls:
            renamed = {}
        if message.tool_calls and not _is_own(message, model_id):
            for call in message.tool_calls:
                renamed[call.id] = _choose(call.id, next(numbers), taken)
                taken.add(renamed[call.id])
            calls = [msgspec.structs.replace(call, id=renamed[call.id]) for call in message.tool_calls]
            message = msgspec.structs.replace(message, tool_calls=calls)  # noqa: PLW2901 - the changed message
        unified.append(message)
    return unified


def make_free_id(number: int, taken: Collection[str]) -> str:
    """Return the first id from `number` on, such as `call00003`, that is not taken; every provider accepts it."""
    names = (f"call{each:05}" for each in count(number))
    return next(name for name in names if name not in taken)


def _is_own(message: ChatMessage, model_id: str) -> bool:
    return message.provider_content is not None and message.provider_content.model_id == model_id


def _choose(call_id: str, number: int, taken: Collection[str]) -> str:
    """Return `call_id` if providers accept it and it is not taken, or else a free id from `number` on, such as
    `call00003`.
    """
    if _ACCEPTED.fullmatch(call_id) and call_id not in taken:
        return call_id
    return make_free_id(number, taken)
