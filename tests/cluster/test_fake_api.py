"""Fake API server with the same answers as a real one, recorded in `answers.json`."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster.cluster_harness import NAMESPACE, open_fake_cluster, turn_until
from tests.cluster.fake_api import FakeApiServer, serve_fake_api
from tests.cluster.fake_api.controllers import ReplicaRetry
from tests.cluster.fake_api.machines import FakeMachine
from tests.cluster.fake_api.schema import KINDS

Json = dict[str, Any]
ANSWERS: list[Json] = json.loads((Path(__file__).parent / "answers.json").read_text())
NO_TOKEN, WRONG_TOKEN = "no token", "wrong token"
SECOND = 0.02
POLL_SECONDS = 0.02
NEVER = ReplicaRetry(0, 0, "", "")


@pytest.fixture
async def api() -> AsyncIterator[FakeApiServer]:
    async with serve_fake_api(second=SECOND) as server:
        yield server


async def test_every_recorded_request_gets_its_recorded_status_and_reason(api: FakeApiServer) -> None:
    wrong = {}
    api.node.delay_seconds = 0.1  # termination takes longer than the next request
    async with aiohttp.ClientSession(base_url=api.url) as session:
        for answer in ANSWERS:
            given = await _replay(session, api, answer)
            if given != (answer["status"], answer["reason"]):
                wrong[answer["name"]] = (given, (answer["status"], answer["reason"]))
    assert wrong == {}


async def _replay(session: aiohttp.ClientSession, api: FakeApiServer, answer: Json) -> tuple[int, str]:
    """Send the requests of a row. Watch events count before the request that causes them."""
    watched: tuple[int, str] | None = None
    given = (0, "")
    for request in answer["requests"]:
        headers = dict(request.get("headers", {}))
        if answer["name"] != NO_TOKEN:
            headers["Authorization"] = f"Bearer {'wrong' if answer['name'] == WRONG_TOKEN else api.token}"
        if "contentType" in request:
            headers["Content-Type"] = request["contentType"]
        body = (
            io.BytesIO(json.dumps(_expand_strings(request["body"])).encode()) if "body" in request else None
        )
        async with session.request(
            request["method"], request["path"], data=body, headers=headers
        ) as response:
            if "watch=" in request["path"]:
                watched = response.status, await _watch_error_reason(response)
            else:
                given = response.status, _status_reason(await response.json())
        is_namespace = request["path"].startswith("/api/v1/namespaces/") and request["path"].count("/") == 4
        if is_namespace and request["method"] == "GET":
            await asyncio.sleep(POLL_SECONDS)  # the recording polled until the object was gone
    return watched or given


def _expand_strings(body: Any) -> Any:  # noqa: ANN401 - JSON
    """Expand the long strings that are abbreviated as a character and a count."""
    if isinstance(body, dict):
        if body.keys() == {"repeat", "times"}:
            return body["repeat"] * body["times"]
        return {name: _expand_strings(value) for name, value in body.items()}
    return [_expand_strings(item) for item in body] if isinstance(body, list) else body


async def _watch_error_reason(response: aiohttp.ClientResponse) -> str:
    if response.status != 200:
        return _status_reason(await response.json())
    try:
        async with asyncio.timeout(0.5):
            event = json.loads(await response.content.readline() or b"{}")
    except TimeoutError:
        return ""
    return _status_reason(event["object"]) if event.get("type") == "ERROR" else ""


def _status_reason(body: Json) -> str:
    return str(body.get("reason", "")) if body.get("kind") == "Status" else ""


# ── controllers and machines ──────────────────────────────────────────────────────────────────────────────────


async def test_a_machine_that_falls_silent_loses_its_pods_in_time_and_ends_them_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with open_fake_cluster(tmp_path, second=SECOND / 10) as (cluster, api):
        api.node.runs_commands = False
        await cluster.start()
        (pod,) = api.store.every("pods", NAMESPACE)
        api.node.machines.append(FakeMachine("node-2"))
        await api.controllers.silence("node-1", is_powered=False)

        def conditions(name: str) -> dict[str, str]:
            found = api.store.get(KINDS["pods"], NAMESPACE, name)
            return {one["type"]: one["status"] for one in found["status"]["conditions"]}

        name = pod["metadata"]["name"]
        await turn_until(lambda: conditions(name)["Ready"] == "False")
        assert conditions(name)["ContainersReady"] == "True", "nobody has heard otherwise"
        await turn_until(lambda: conditions(name).get("DisruptionTarget") == "True")
        await turn_until(lambda: machines_of(api) == ["node-1", "node-2"])
        assert "deletionTimestamp" in api.store.get(KINDS["pods"], NAMESPACE, name)["metadata"]
        api.controllers.mend("node-1")
        await turn_until(lambda: machines_of(api) == ["node-2"])


def machines_of(api: FakeApiServer) -> list[str]:
    return sorted(pod["spec"].get("nodeName", "") for pod in api.store.every("pods", NAMESPACE))


async def test_a_pod_over_the_quota_is_made_again_later_and_later_unless_its_deployment_changes(
    tmp_path: Path,
) -> None:
    async with open_fake_cluster(tmp_path) as (cluster, api):
        api.node.runs_commands = False
        await cluster.set_quota({"pods": "0"})
        desired = cluster.desired()
        await cluster.driver.apply(desired)
        (deployment,) = api.store.every("deployments", NAMESPACE)
        retries = api.controllers.retries
        await turn_until(lambda: retries.get(deployment["metadata"]["uid"], NEVER).failures > 2)
        assert "exceeded quota: quota, requested: pods=1, used: pods=0, limited: pods=0" in str(
            deployment["status"]
        )
        retries[deployment["metadata"]["uid"]].at += 1_000
        await cluster.set_quota(None)
        deployment["metadata"].setdefault("annotations", {})["touched"] = "yes"
        api.store.touch()
        await cluster.ready(desired.workflow_id)
