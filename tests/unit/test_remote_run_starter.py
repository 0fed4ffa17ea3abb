"""Starts of other workflows from a pod: the request carries all that decides about the run."""

from __future__ import annotations

from typing import Any, cast

import pytest

from engine.services import RunCaller
from execution.pod_api import StartRunRequest, StartRunResponse
from runner.gateway_client import GatewayClient
from runner.node_services import RemoteRunStarter


class RecordingGateway:
    """Gateway that starts each run and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[StartRunRequest] = []

    async def call(self, path: str, call: StartRunRequest, _answer: type[Any]) -> StartRunResponse:
        assert path == "/executions/exec_1/runs"
        self.requests.append(call)
        return StartRunResponse("exec_2")


@pytest.mark.parametrize("is_tainted", [True, False])
@pytest.mark.parametrize("is_read_only", [True, False])
async def test_a_start_from_a_pod_keeps_its_restrictions(*, is_tainted: bool, is_read_only: bool) -> None:
    caller = RunCaller(
        "org_1", "user_1", "wf_1", "exec_1", "exec_1", is_tainted=is_tainted, is_read_only=is_read_only
    )
    gateway = RecordingGateway()
    starter = RemoteRunStarter(cast("GatewayClient", gateway))
    started = await starter.start(caller, "wf_2", {}, node_id="sub", iteration="0", awaited=True)
    assert started == "exec_2"
    (request,) = gateway.requests
    assert (request.is_tainted, request.is_read_only) == (is_tainted, is_read_only)
