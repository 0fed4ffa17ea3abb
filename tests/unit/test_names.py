"""Suggestions for misspelled names."""

import pytest

from engine import name_suggestions

FIELDS = ["id", "maxAttempts", "retry", "timeout", "inputMappings", "position"]
TYPES = ["email-parse", "email-send", "manual", "mysql-destination", "mysql-source", "queue-trigger", "set"]


@pytest.mark.parametrize(
    ("given", "known", "meant"),
    [
        ("max_attempts", FIELDS, ["maxAttempts"]),
        ("Max-Attempts", FIELDS, ["maxAttempts"]),
        ("pos", FIELDS, ["position"]),
        ("retries", FIELDS, ["retry"]),
        ("inputMaping", FIELDS, ["inputMappings"]),
        ("timeuot", FIELDS, ["timeout"]),
        ("color", FIELDS, []),
        ("positionAbsolute", FIELDS, []),
        ("mysql", TYPES, ["mysql-source", "mysql-destination"]),
        ("email", TYPES, ["email-send", "email-parse"]),
        ("queue", TYPES, ["queue-trigger"]),
        ("queu-triger", TYPES, ["queue-trigger"]),
        ("", TYPES, []),
        ("x" * 1_000_000, TYPES, []),
    ],
)
def test_names_that_begin_so_come_before_those_that_are_alike(
    given: str, known: list[str], meant: list[str]
) -> None:
    assert name_suggestions.suggest_names(given, known) == meant
