"""Status, metrics and permissions of language models, and the list of those that a user may name."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, update
from sqlmodel import col

from engine.model_calls import (
    ChatMessage,
    ChatRequest,
    FailedModelCall,
    MessageRole,
    ModelBudget,
    ModelCallFailed,
    ModelSettlement,
    NodeSpending,
    TokenUsage,
)
from engine.run_errors import NodeError
from execution.stored_model_ledger import StoredModelLedger
from models.ai_model import AiModel
from models.model_hour import ModelHour
from nodes.ai.model_caller import ModelCaller
from scheduler import retention
from tests.fakes.model_lookup import LOOPBACK
from tests.fakes.model_server import KEY, ModelFault, ScriptedAnswer, serve_models
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.integration.test_gateway_ai_models import (
    MODELS,
    SETTINGS,
    allow_loopback,
    caller_of,
    create_model,
    create_provider,
    stored_models,
)

REQUEST = ChatRequest((ChatMessage(MessageRole.USER, "Hi"),), 100)
USABLE = "/api/v1/ai-models"


async def get(person: UserClient, path: str) -> dict[str, Any]:
    response = await person.api.get(path)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_metrics_show_the_calls_that_were_made(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    failing, answered = ScriptedAnswer(fault=ModelFault.SERVER_ERROR), ScriptedAnswer()
    async with serve_models(failing, answered) as served:
        source_id = await create_provider(people.owner, served.url)
        model_id = await create_model(people.owner, source_id, price={"input": "1", "output": "10"})
        models, caller = ModelCaller(stored_models(harness), LOOPBACK, ()), caller_of(people.owner)
        spending = NodeSpending("ask:")
        with pytest.raises(ModelCallFailed):
            await models.complete(caller, model_id, REQUEST, idempotency_key="1", spending=spending)
        for key in ("2", "3"):
            await models.complete(caller, model_id, REQUEST, idempotency_key=key, spending=spending)
        gone_id = await create_provider(people.owner, "http://127.0.0.1:1")
        moved = await people.owner.api.put(f"{MODELS}/{model_id}", json={"dataSourceId": gone_id})
        assert moved.status_code == 200, moved.text
        # Another run, since this one has just looked up the model.
        later = msgspec.structs.replace(caller, execution_id="exec_later")
        with pytest.raises(ModelCallFailed):
            await models.complete(later, model_id, REQUEST, idempotency_key="4", spending=spending)
        for refused, code in (
            (NodeSpending("ask:", ModelBudget(max_tokens=1)), "model-budget-exceeded"),
            (spending, "model-rate-limited"),
        ):
            run = msgspec.structs.replace(caller, execution_id=f"exec_{code}")
            with pytest.raises(NodeError) as failed:
                await models.complete(run, model_id, REQUEST, idempotency_key="5", spending=refused)
            assert failed.value.code == code
            await stored_models(harness).block(caller, model_id, 60)
        await models.close()
    found = await get(people.owner, f"{MODELS}/{model_id}/metrics")
    assert (found["modelId"], found["window"]) == (model_id, "24h")
    total = found["total"]
    assert (total["requests"], total["failed"], total["unpricedRequests"]) == (4, 2, 0)
    assert (total["inputTokens"], total["outputTokens"], total["cost"]) == (200, 40, "0.0006")
    assert total["p50Ms"] is not None
    assert found["errors"] == [{"code": "model-unavailable", "count": 2}]


async def test_metrics_of_a_window_have_percentiles_and_periods(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id = await create_provider(people.owner)
    model_id, failing_id = [await create_model(people.owner, source_id, name=name) for name in "ab"]
    ledger, caller = StoredModelLedger(harness.gateway.database, is_deferring=True), caller_of(people.owner)
    await ledger.count_failure(caller, FailedModelCall(failing_id, "model-unavailable"))
    for number in range(20):
        taken = 10_000 if number == 0 else 100
        usage = TokenUsage(3, 2)
        settlement = ModelSettlement(f"key-{number}", "ask:", model_id, usage, None, taken)
        await ledger.settle(caller, settlement, is_reserved=False)
        await ledger.settle(caller, settlement, is_reserved=False)
    for code in ("model-unavailable", "model-rate-limited", "model-unavailable"):
        await ledger.count_failure(caller, FailedModelCall(model_id, code))
    await ledger.close()
    for window, count in (("24h", 24), ("7d", 7), ("30d", 30), ("90d", 90)):
        found = await get(people.owner, f"{MODELS}/{model_id}/metrics?window={window}")
        total = found["total"]
        assert (total["requests"], total["failed"], total["inputTokens"]) == (23, 3, 60)
        assert (total["cost"], total["unpricedRequests"]) == ("0", 20)
        assert total["p50Ms"] == pytest.approx(100, rel=0.1)
        assert total["p95Ms"] == pytest.approx(100, rel=0.1)
        assert found["errors"] == [
            {"code": "model-unavailable", "count": 2},
            {"code": "model-rate-limited", "count": 1},
        ]
        assert len(found["periods"]) == count
        assert found["periods"][0]["startsAt"] == found["since"]
        sums = Counter[str]()
        for period in found["periods"]:
            sums.update({name: period[name] for name in ("requests", "failed", "inputTokens")})
        assert sums == {"requests": 23, "failed": 3, "inputTokens": 60}
    assert_refused(await people.owner.api.get(f"{MODELS}/{model_id}/metrics?window=1y"), 400, "invalid-query")
    # A failure is no answer within no time.
    failing = (await get(people.owner, f"{MODELS}/{failing_id}/metrics"))["total"]
    assert (failing["requests"], failing["failed"], failing["p50Ms"], failing["p95Ms"]) == (1, 1, None, None)


@pytest.mark.every_database
async def test_the_statistics_of_runs_have_the_calls_of_all_models_for_admins_and_of_own_ones_for_others(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    source_id = await create_provider(people.owner)
    own_id = await create_model(people.owner, source_id)
    other_id = await create_model(people.admin, source_id, name="Other")
    ledger, caller = StoredModelLedger(harness.gateway.database), caller_of(people.owner)
    for number, (model_id, cost) in enumerate(((own_id, 1_000_000), (other_id, 2_000_000), (other_id, None))):
        usage = TokenUsage(3, 2)
        settlement = ModelSettlement(f"summed-{number}", "ask:", model_id, usage, cost, 100)
        await ledger.settle(caller, settlement, is_reserved=False)
    await ledger.count_failure(caller, FailedModelCall(own_id, "model-unavailable"))
    assert (await people.admin.api.delete(f"{MODELS}/{other_id}")).status_code == 204
    none = {"calls": 0, "unpricedCalls": 0, "inputTokens": 0, "outputTokens": 0, "cost": "0"}
    own = {"calls": 1, "unpricedCalls": 0, "inputTokens": 3, "outputTokens": 2, "cost": "0.001"}
    every = {"calls": 3, "unpricedCalls": 1, "inputTokens": 9, "outputTokens": 6, "cost": "0.003"}
    for person, expected in (
        (people.admin, every),
        (people.owner, own),
        (people.colleague, none),
        (people.stranger, none),
    ):
        shown = await get(person, "/api/v1/executions/statistics")
        assert shown["total"]["usage"] == expected
        assert sum(hour["usage"]["calls"] for hour in shown["hours"]) == expected["calls"]


async def test_metrics_of_earlier_hours_are_forgotten_after_the_longest_window(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    model_id = await create_model(people.owner, await create_provider(people.owner))
    database = harness.gateway.database
    now = database.clock.now().replace(minute=0, second=0, microsecond=0)
    rows = [
        ModelHour(
            organization_id=people.owner.user.organization_id,
            model_id=model_id,
            starts_at=now - timedelta(days=days),
            error="",
            bucket=10,
            calls=1,
            unpriced_calls=0,
            input_tokens=1,
            output_tokens=1,
            cost=0,
        )
        for days in (0, 2, 40, 89, 100)
    ]

    async def store(connection: Any) -> None:  # noqa: ANN401 - a connection of either database
        for row in rows:
            await connection.execute(insert(ModelHour).values(row.model_dump()))

    await database.transaction(store)
    for expected in ({"24h": 1, "7d": 2, "30d": 2, "90d": 4}, {"90d": 4}):
        for window, count in expected.items():
            found = await get(people.owner, f"{MODELS}/{model_id}/metrics?window={window}")
            assert found["total"]["requests"] == count, window
        await retention.forget_model_hours(database)


async def test_metrics_are_for_the_owner_and_admins(people: OrganizationUsers) -> None:
    model_id = await create_model(people.owner, await create_provider(people.owner), isShared=True)
    path = f"{MODELS}/{model_id}/metrics"
    assert (await get(people.admin, path))["total"]["requests"] == 0
    assert_refused(await people.colleague.api.get(path), 403, "not-owner")
    assert_refused(await people.stranger.api.get(path), 404, "not-found")


async def test_the_status_of_a_model_is_that_of_its_last_test(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_loopback(harness, monkeypatch)
    async with serve_models(ScriptedAnswer(fault=ModelFault.REPEATS_KEY)) as served:
        model_id = await create_model(
            people.owner, await create_provider(people.owner, served.url), isShared=True
        )
        path = f"{MODELS}/{model_id}"
        untested = await get(people.colleague, f"{path}/status")
        assert untested == {
            "modelId": model_id,
            "status": "untested",
            "reachable": None,
            "blockedUntil": None,
            "lastTest": None,
        }
        await people.owner.api.post(f"{path}/test")
        failed = await get(people.colleague, f"{path}/status")
        assert (failed["status"], failed["reachable"], failed["lastTest"]["ok"]) == ("failed", False, False)
        assert failed["lastTest"]["message"].startswith("The provider answered 401")
        assert KEY not in failed["lastTest"]["message"]
        served.script[:] = [ScriptedAnswer()]
        await people.owner.api.post(f"{path}/test")
        active = await get(people.colleague, f"{path}/status")
        assert (active["status"], active["reachable"]) == ("active", True)
        served.script[:] = [ScriptedAnswer(fault=ModelFault.SERVER_ERROR)]
        await people.owner.api.post(f"{path}/test")
        # What an answered test has seen is still known.
        assert (await get(people.owner, path))["capabilities"] is not None
        assert (await get(people.owner, f"{path}/status"))["status"] == "failed"
    assert_refused(await people.stranger.api.get(f"{path}/status"), 404, "not-found")
    await people.owner.api.put(path, json={"vendorModelId": "scripted-2"})
    assert await get(people.owner, f"{path}/status") == untested


async def test_a_model_is_blocked_until_the_time_of_its_provider(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    model_id = await create_model(people.owner, await create_provider(people.owner))
    for seconds, status in ((600, "blocked"), (-600, "untested")):
        await set_block(harness, model_id, harness.gateway.clock() + timedelta(seconds=seconds))
        found = await get(people.owner, f"{MODELS}/{model_id}/status")
        assert (found["status"], found["blockedUntil"] is None) == (status, seconds < 0)


async def set_block(harness: GatewayHarness, model_id: str, until: datetime) -> None:
    """Store the time until which the provider of a model accepts no calls."""

    async def work(connection: Any) -> None:  # noqa: ANN401 - a connection of either database
        statement = update(AiModel).where(col(AiModel.id) == model_id)
        await connection.execute(statement.values(blocked_until=until))

    await harness.gateway.database.transaction(work)


@pytest.mark.every_database
async def test_the_usable_models_are_ranked_and_contain_the_built_in_one(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_loopback(harness, monkeypatch)
    async with serve_models() as served:
        source_id = await create_provider(people.owner, served.url)
        shared = {"isShared": True}
        by_name = {
            name: await create_model(people.owner, source_id, name=name, **shared)
            for name in ("beta", "Alpha", "tested")
        }
        hidden = await create_model(
            people.owner, source_id, name="hidden", price={"input": "1", "output": "2"}
        )
        await people.owner.api.post(f"{MODELS}/{by_name['tested']}/test")
    foreign = await get(people.stranger, USABLE)
    assert [one["id"] for one in foreign["models"]] == ["echo"]
    for path in (USABLE, "/api/v1/workflow-nodes/services/models"):
        listed = await get(people.colleague, path)
        assert [one["name"] for one in listed["models"]] == ["tested", "Alpha", "beta", "echo"]
        assert listed["count"] == 4
    await people.admin.api.put(SETTINGS, json={"defaultModelId": by_name["beta"]})
    models = (await get(people.owner, USABLE))["models"]
    assert [one["name"] for one in models] == ["beta", "tested", "Alpha", "hidden", "echo"]
    assert [one["isDefault"] for one in models] == [True, False, False, False, False]
    assert [one["isPriced"] for one in models if one["id"] in {hidden, "echo"}] == [True, True]
    assert models[0] == {
        "id": by_name["beta"],
        "name": "beta",
        "type": "third-party",
        "provider": "openai-compatible",
        "vendorModelId": "scripted-1",
        "status": "untested",
        "isDefault": True,
        "isPriced": False,
        "contextLength": None,
        "maxOutputTokens": None,
        "capabilities": None,
    }


async def test_permissions_are_those_of_the_model(people: OrganizationUsers) -> None:
    owner, colleague = people.owner, people.colleague
    model_id = await create_model(owner, await create_provider(owner))
    path = f"{MODELS}/{model_id}/permissions"
    assert_refused(await colleague.api.get(path), 404, "not-found")
    guest = colleague.user.id
    given = await owner.api.put(path, json={"sharedWith": [guest]})
    expected = {
        "modelId": model_id,
        "ownerId": owner.user.id,
        "isShared": False,
        "sharedWith": [guest],
        "canEdit": True,
    }
    assert given.json() == expected
    assert await get(colleague, path) == {**expected, "canEdit": False}
    assert (await owner.api.put(path, json=expected)).json() == expected
    assert (await get(owner, f"{MODELS}/{model_id}"))["sharedWith"] == [guest]
    assert_refused(await colleague.api.put(path, json={"isShared": True}), 403, "not-owner")
    foreign = await owner.api.put(path, json={"sharedWith": [people.stranger.user.id]})
    assert foreign.json()["error"]["details"][0]["code"] == "user-not-found"
    stale = await owner.api.put(
        path, json={"isShared": True}, headers={"If-Match": given.headers["etag"] + "9"}
    )
    assert_refused(stale, 412, "precondition-failed")
    taken = await owner.api.put(path, json={"isShared": True, "sharedWith": []})
    assert (taken.json()["isShared"], taken.json()["sharedWith"]) == (True, [])
