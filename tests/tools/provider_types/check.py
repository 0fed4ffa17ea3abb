"""Validate requests and answers by the types that the providers publish in their Python packages.

Standard input has a JSON object: for `anthropic` and `openai` each an object with `requests` and `events`. Prints one
line for each error, and exits with 1 if there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from anthropic.types import RawMessageStreamEvent
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import BaseModel, TypeAdapter, ValidationError

TYPES: Mapping[str, tuple[TypeAdapter[Any], TypeAdapter[Any]]] = {
    "anthropic": (TypeAdapter(MessageCreateParamsStreaming), TypeAdapter(RawMessageStreamEvent)),
    "openai": (TypeAdapter(CompletionCreateParamsStreaming), TypeAdapter(ChatCompletionChunk)),
}


def find_errors(given: Mapping[str, Mapping[str, list[Any]]]) -> Iterable[str]:
    """Yield a sentence for each request and event that the provider's types do not accept,
    or do not know all fields of.
    """
    for provider, (request_type, event_type) in TYPES.items():
        for request in given[provider]["requests"]:
            try:
                known = list_all(request_type.validate_python(request))
            except ValidationError as error:
                yield f"{provider}: {error}: {request}"
                continue
            # Typed dictionaries drop fields that they don't know.
            if known != request:
                yield f"{provider}: unknown fields in {request}, of which {known} are known"
        for event in given[provider]["events"]:
            try:
                event_type.validate_python(event)
            except ValidationError as error:
                yield f"{provider}: {error}: {event}"


def list_all(value: object) -> object:
    """Return a validated value with lists in place of lazily validated iterables, and objects in place of models."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {name: list_all(each) for name, each in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    return [list_all(each) for each in value]


if __name__ == "__main__":
    errors = list(find_errors(json.load(sys.stdin)))
    sys.stdout.write("\n".join(errors))
    sys.exit(bool(errors))
