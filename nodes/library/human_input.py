"""Ask a person for input, and wait for the answer."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final, cast

from engine.node_api import AnswerSource, AnswerWait, NodeResult
from nodes import config_fields

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from engine.node_api import NodeCall
    from engine.values import Json

LONGEST_SECONDS: Final = 31_536_000
EXPIRED_PORT: Final = "expired"
EMPTY_ANSWER: Final[Mapping[str, Json]] = {"data": None, "choice": None, "by": None, "at": None}


class ExpiryAction(StrEnum):
    """Handling of an input request that expires without an answer."""

    FAIL = "fail"
    CONTINUE = "continue"


def run(call: NodeCall) -> AnswerWait:
    on_expiry = config_fields.read_choice(call.config, "onExpiry", ExpiryAction)
    return AnswerWait(
        AnswerSource.INPUT,
        request=_build_request(call.config),
        expires_at=_expires_at(call),
        expired=NodeResult(dict(EMPTY_ANSWER), port=EXPIRED_PORT)
        if on_expiry is ExpiryAction.CONTINUE
        else None,
    )


def _build_request(config: Mapping[str, Json]) -> Json:
    """Return the question that people with permission to answer see: its title, form, choices, assignees and so on."""
    request: dict[str, Json] = {"title": config_fields.read_text(config, "title")}
    if "description" in config:
        request["description"] = config_fields.read_text(config, "description")
    if "schema" in config:
        request["schema"] = config["schema"]
    if "choices" in config:
        choices = cast("list[dict[str, Json]]", config["choices"])
        request["choices"] = [
            {"port": choice["port"], "label": choice.get("label", choice["port"])} for choice in choices
        ]
    for name in ("assignees", "approvals", "allowSelf", "remindAfterSeconds", "notify"):
        if name in config:
            request[name] = config[name]
    return request


def _expires_at(call: NodeCall) -> datetime | None:
    if "expiresInSeconds" not in call.config:
        return None
    seconds = config_fields.read_number(call.config, "expiresInSeconds", minimum=1, maximum=LONGEST_SECONDS)
    return call.now + timedelta(seconds=seconds)
