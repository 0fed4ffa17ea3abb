import pytest

from engine.values import Json
from nodes import catalog
from nodes.config_formats import is_time_zone


def test_a_time_zone_is_one_of_the_iana_database() -> None:
    assert is_time_zone("Europe/Berlin")
    assert is_time_zone("UTC")
    assert not any(map(is_time_zone, ("", "Europe/Berln", "../etc/passwd", "localtime/..", "+02:00")))


def test_a_config_is_told_which_form_its_text_lacks() -> None:
    loaded = catalog.load_catalog()
    node_type = loaded.get("schedule-trigger")
    assert loaded.config_problems(node_type, {"cron": "0 6 * * mon-fri", "timezone": "Asia/Tokyo"}) == []
    problems = loaded.config_problems(node_type, {"cron": "@daily", "timezone": "Mars"})
    assert [(problem.path, problem.keyword, problem.message) for problem in problems] == [
        (
            "cron",
            "format",
            (
                "must be a cron expression of five fields (minute, hour, day of month, month and day of week)"
                " that matches some time"
            ),
        ),
        ("timezone", "format", "must be an IANA time zone such as Europe/Berlin"),
    ]


@pytest.mark.parametrize("event_type", ["user.created", "user.*", "a", ["user.created", "order.*"]])
def test_an_event_type_matches_exactly_or_by_prefix(event_type: Json) -> None:
    loaded = catalog.load_catalog()
    assert loaded.config_problems(loaded.get("event-trigger"), {"event_type": event_type}) == []


@pytest.mark.parametrize(
    "event_type", ["", "*", "user.*.x", "a b", "user*", [], ["*"], [["a"]], 1, "{{ data.x }}*"]
)
def test_patterns_that_match_no_event_are_problems(event_type: Json) -> None:
    loaded = catalog.load_catalog()
    problems = loaded.config_problems(loaded.get("event-trigger"), {"event_type": event_type})
    assert problems
