"""Conditions on events: evaluated one by one, with the values of their run substituted once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from engine import event_filters
from engine.conditions import compile_condition
from engine.expressions import ExpressionError
from engine.node_api import AnswerSource, AnswerWait, NodeResult
from engine.services import EventWaitRequest
from tests.node_calls import call

if TYPE_CHECKING:
    from datetime import datetime

    from engine.services import RunCaller
    from engine.values import Json

EVENT: Json = {"event_type": "order.paid", "event_data": {"order": 7, "tags": ["a"]}, "source": "shop"}


def make_condition(left: Json, operator: str, right: Json) -> dict[str, Json]:
    return {"left": left, "operator": operator, "right": right}


def test_a_condition_is_tested_on_an_event() -> None:
    large = json.dumps(make_condition("{{ data.event_data.order }}", "greater-than", 5))
    assert event_filters.matches_event(large, {"data": EVENT})
    assert not event_filters.matches_event(large, {"data": {"event_data": {"order": 5}}})
    with pytest.raises(ExpressionError, match="two numbers"):
        event_filters.matches_event(large, {"data": {}})


def test_a_condition_that_takes_long_is_not_answered() -> None:
    joined: Json = {"$op": "join", "args": ["{{ data.texts }}", ","]}
    asked = json.dumps(make_condition(joined, "equals", ""))
    with pytest.raises(ExpressionError, match="too long"):
        event_filters.matches_event(asked, {"data": {"texts": ["x" * 1_000] * 1_000}})


def test_a_condition_reads_values_of_its_run_once() -> None:
    source: Json = {
        "all": [
            make_condition("{{ item.event_data.order }}", "equals", "{{ data.order }}"),
            make_condition("{{item.source}}/{{ nodes.a.name }}", "equals", "shop/{{ item.source }}"),
            {"not": make_condition({"$op": "add", "args": ["{{ data.missing }}", 1]}, "equals", 2)},
        ]
    }
    unresolved: list[str] = []
    scope: dict[str, Json] = {"data": {"order": 7}, "nodes": {"a": {"name": "{{ item.source }}"}}}
    bound, given = event_filters.bind_condition(compile_condition(source), scope, unresolved)
    assert given == [7, "{{ item.source }}", None]
    assert unresolved == ["data.missing"]
    assert bound == {
        "all": [
            make_condition("{{ item.event_data.order }}", "equals", "{{ data[0] }}"),
            make_condition("{{ item.source }}/{{ data[1] }}", "equals", "shop/{{ item.source }}"),
            {"not": make_condition({"$op": "add", "args": ["{{ data[2] }}", 1]}, "equals", 2)},
        ]
    }
    assert isinstance(bound, dict)
    assert isinstance(bound["all"], list)
    first, second, _ = bound["all"]
    assert event_filters.matches_event(json.dumps(first), {"item": EVENT, "data": given})
    # The run's data is never an expression, even if it looks like one.
    assert not event_filters.matches_event(json.dumps(second), {"item": EVENT, "data": given})


class RecordedEventWaits:
    """Event waits that are recorded only."""

    def __init__(self, expires_at: datetime | None = None) -> None:
        self.wanted: list[tuple[str, str, str, EventWaitRequest]] = []
        self._expires_at = expires_at

    async def expect(
        self, caller: RunCaller, wanted: EventWaitRequest, *, node_id: str, iteration: str
    ) -> datetime | None:
        self.wanted.append((caller.execution_id, node_id, iteration, wanted))
        return self._expires_at


async def test_a_node_asks_for_its_event_and_waits() -> None:
    ear = RecordedEventWaits()
    config: dict[str, Json] = {
        "event_type": "order.{{ data.order }}.*",
        "filter": make_condition("{{ item.event_data.order }}", "equals", "{{ data.order }}"),
        "lookBackSeconds": 60,
        "timeoutSeconds": 3600,
    }
    called = await call("wait-for-event", config, {"order": 7}, events=ear)
    ((_, node_id, iteration, wanted),) = ear.wanted
    assert (node_id, iteration) == ("node", "")
    assert wanted == EventWaitRequest(
        "order.7.*",
        '{"left":"{{ item.event_data.order }}","operator":"equals","right":"{{ data[0] }}"}',
        "[7]",
        60,
        3600,
    )
    nothing: Json = {"event_type": None, "event_data": None, "source": None}
    request: Json = {"event_type": "order.7.*"}
    assert called.outcome == AnswerWait(
        AnswerSource.EVENT, request, None, NodeResult(nothing, port="timeout")
    )


@pytest.mark.parametrize("event_type", ["{{ data }}", "a {{ data.order }}", "*"])
async def test_a_node_refuses_invalid_event_types(event_type: str) -> None:
    with pytest.raises(Exception, match="event_type"):
        await call("wait-for-event", {"event_type": event_type}, {"order": 7}, events=RecordedEventWaits())


def test_fallbacks_of_a_condition_are_looked_up_as_far_as_the_run_knows_them() -> None:
    source: Json = {
        "all": [
            make_condition(
                '{{ data.gone ?? data.order ?? "none" }}',
                "equals",
                "{{ item.gone ?? item.event_data.order }}",
            ),
            make_condition(
                '{{ data.gone ?? "shop" }}', "equals", "{{ item.gone ?? data.gone ?? nodes.a.name }}"
            ),
            make_condition("{{ data.gone ?? data.lost }}", "equals", None),
        ]
    }
    unresolved: list[str] = []
    scope: dict[str, Json] = {"data": {"order": 7}, "nodes": {"a": {"name": "shop"}}}
    bound, given = event_filters.bind_condition(compile_condition(source), scope, unresolved)
    assert given == [7, "shop", "shop", None]
    assert unresolved == ["data.lost"]
    assert isinstance(bound, dict)
    assert isinstance(bound["all"], list)
    for asked in bound["all"][:2]:
        assert event_filters.matches_event(json.dumps(asked), {"item": EVENT, "data": given})
