"""The fake API server gives the answers that a real one gave, recorded in `answers.json`."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster.fake_api import FakeApi, serving

Json = dict[str, Any]
ANSWERS: list[Json] = json.loads((Path(__file__).parent / "answers.json").read_text())
NO_TOKEN, WRONG_TOKEN = "no token", "wrong token"
SECOND = 0.02
POLL_SECONDS = 0.02


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with serving(second=SECOND) as server:
        yield server


async def test_every_recorded_request_gets_its_recorded_status_and_reason(api: FakeApi) -> None:
    wrong = {}
    api.node.delay_seconds = 0.1  # what terminates does so for longer than the next request takes
    async with aiohttp.ClientSession(base_url=api.url) as session:
        for answer in ANSWERS:
            given = await _replay(session, api, answer)
            if given != (answer["status"], answer["reason"]):
                wrong[answer["name"]] = (given, (answer["status"], answer["reason"]))
    assert wrong == {}


async def _replay(session: aiohttp.ClientSession, api: FakeApi, answer: Json) -> tuple[int, str]:
    """Send the requests of a row; what a watch is answered with counts before what is sent to give it events."""
    watched: tuple[int, str] | None = None
    given = (0, "")
    for request in answer["requests"]:
        headers = dict(request.get("headers", {}))
        if answer["name"] != NO_TOKEN:
            headers["Authorization"] = f"Bearer {'wrong' if answer['name'] == WRONG_TOKEN else api.token}"
        if "contentType" in request:
            headers["Content-Type"] = request["contentType"]
        body = io.BytesIO(json.dumps(_whole(request["body"])).encode()) if "body" in request else None
        async with session.request(
            request["method"], request["path"], data=body, headers=headers
        ) as response:
            if "watch=" in request["path"]:
                watched = response.status, await _reason_of_watch(response)
            else:
                given = response.status, _reason(await response.json())
        is_namespace = request["path"].startswith("/api/v1/namespaces/") and request["path"].count("/") == 4
        if is_namespace and request["method"] == "GET":
            await asyncio.sleep(POLL_SECONDS)  # it was asked for again and again until it was gone
    return watched or given


def _whole(body: Any) -> Any:  # noqa: ANN401 - JSON
    """Write out the long strings that are told as a character and how often it stands there."""
    if isinstance(body, dict):
        if body.keys() == {"repeat", "times"}:
            return body["repeat"] * body["times"]
        return {name: _whole(value) for name, value in body.items()}
    return [_whole(item) for item in body] if isinstance(body, list) else body


async def _reason_of_watch(response: aiohttp.ClientResponse) -> str:
    if response.status != 200:
        return _reason(await response.json())
    try:
        async with asyncio.timeout(0.1):
            event = json.loads(await response.content.readline() or b"{}")
    except TimeoutError:
        return ""
    return _reason(event["object"]) if event.get("type") == "ERROR" else ""


def _reason(body: Json) -> str:
    return str(body.get("reason", "")) if body.get("kind") == "Status" else ""
