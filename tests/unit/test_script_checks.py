import time

import pytest

from engine.findings import ValidationResult
from engine.graph import ParsedGraph
from engine.validation import find_errors
from engine.values import Json
from nodes import catalog


def validate_scripts(*sources: str) -> ValidationResult:
    nodes: list[Json] = [
        {"id": f"n{number}", "type": "code", "config": {"source": text}}
        for number, text in enumerate(sources)
    ]
    trigger: Json = {"id": "start", "type": "manual"}
    edges: list[Json] = [
        {"id": f"e{number}", "source": "start", "target": f"n{number}"} for number in range(len(sources))
    ]
    return find_errors(
        ParsedGraph.from_stored({"nodes": [trigger, *nodes], "connections": edges}), catalog.load_catalog()
    )


def script_errors(*sources: str) -> list[str]:
    return [finding.message for finding in validate_scripts(*sources).errors]


@pytest.mark.parametrize(
    "source",
    [
        "data",
        "if data:\n    return 1\n2",
        "f'{{{data}}}'",
        "{{ data.x }}",
        "x = {**{}}\n{{}: 1} if x else 2",
        "'\\d'",
    ],
)
def test_code_that_can_be_read_is_no_finding(source: str) -> None:
    assert script_errors(source) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\nif x\n    y", "config.source: line 2: expected ':'"),
        ("(" * 1_000, "config.source"),
        ("a" + "+a" * 30_000, "config.source"),
        ("-" * 60_000 + "1", "config.source"),
        ("x\0", "config.source"),
    ],
)
def test_code_that_cannot_be_read_is_a_finding(source: str, said: str) -> None:
    (message,) = script_errors(source)
    assert said in message
    assert len(message) < 500


def test_only_so_much_code_of_one_graph_is_read() -> None:
    began_at = time.process_time()
    broken = "x = [1, 2, 3]\n" * 4_000 + "("
    assert 0 < len(script_errors(*(f"{broken}{number}" for number in range(40)))) < 10
    assert time.process_time() - began_at < 8


def test_reading_code_runs_none_of_it() -> None:
    assert script_errors("raise SystemExit", "__import__('os').abort()") == []
