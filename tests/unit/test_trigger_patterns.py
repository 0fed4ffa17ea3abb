from __future__ import annotations

from typing import Any

import pytest

from models.workflow_triggers import MAX_PATTERNS, matching_patterns, parse_patterns


@pytest.mark.parametrize(
    ("event_type", "patterns"),
    [
        ("created", ["created"]),
        ("user.created", ["user.created", "user.*"]),
        ("a.b.c", ["a.b.c", "a.*", "a.b.*"]),
        (".a", [".a"]),
        ("a..b", ["a..b", "a.*", "a..*"]),
        ("github.push", ["github.push", "github.*"]),
        ("github.ping", ["github.ping"]),
    ],
)
def test_a_type_of_events_is_matched_by_itself_and_by_each_of_its_beginnings(
    event_type: str, patterns: list[str]
) -> None:
    assert matching_patterns(event_type) == patterns


@pytest.mark.parametrize(
    ("event_type", "patterns"),
    [
        ("user.created", ["user.created"]),
        (["user.*", "order.paid", "user.*"], ["user.*", "order.paid"]),
        (["*", "a b", "a.*.b", 7, None, "", "ok"], ["ok"]),
        (None, []),
        ({"a": 1}, []),
        ([f"type-{number}" for number in range(200)], [f"type-{number}" for number in range(MAX_PATTERNS)]),
    ],
)
def test_a_trigger_matches_the_patterns_of_its_config_and_nothing_that_is_none(
    event_type: Any,  # noqa: ANN401 - any JSON value
    patterns: list[str],
) -> None:
    assert parse_patterns({"event_type": event_type}) == patterns
