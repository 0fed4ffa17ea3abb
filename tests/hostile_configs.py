"""Hostile JSON values for the fields of nodes, and the check that validation survives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

from engine.graph import GraphEdge, GraphNode, ParsedGraph
from engine.validation import validate_graph
from engine.values import InvalidJson, Json, decode_json
from nodes import catalog

CATALOG: Final = catalog.load_catalog()

HOSTILE_TEXTS: Final[Mapping[str, Callable[[int], str]]] = {
    "null": lambda _: "null",
    "a boolean": lambda _: "true",
    "a fraction": lambda _: "-0.5",
    "a number beyond 64 bits": lambda _: "123456789012345678901234567890",
    "a number of many digits": lambda size: "9" * size,
    "a number beyond all numbers": lambda _: "1e999",
    "the largest number": lambda _: "1.7976931348623157e308",
    "not a number": lambda _: "NaN",
    "the text of infinity": lambda _: '"-Infinity"',
    "the text of not a number": lambda _: '"NaN"',
    "control characters": lambda _: r'"\u0000\u0007\u001b[31m\u007f\u0085\u2028\u202e"',
    "half of a character": lambda _: r'"\ud800"',
    "a long text": lambda size: '"' + "x" * size + '"',
    "an expression without an end": lambda size: '"' + "{{" * (size // 2) + '"',
    "an expression of many steps": lambda size: '"{{ data' + ".a" * (size // 2) + ' }}"',
    "an expression of many parentheses": lambda size: '"{{ ' + "(" * size + ' }}"',
    "a pattern that backtracks": lambda size: '"' + "(a+)+" * (size // 5) + '$"',
    "a schedule of many parts": lambda size: '"' + "*/1," * (size // 4) + '* * * * *"',
    "a deep list": lambda size: "[" * size + "]" * size,
    "a deep object": lambda size: '{"a":' * size + "1" + "}" * size,
    "a list as deep as is taken": lambda _: "[" * 60 + "]" * 60,
    "a long list": lambda size: "[" + "1," * (size // 2) + "null]",
    "many keys": lambda size: "{" + ",".join(f'"{number}":{{}}' for number in range(size // 10)) + "}",
    "odd keys": lambda _: r'{"": 1, "\u0000": 2, "$op": "no-such", "__proto__": {}, "args": [null]}',
}
"""Generators of hostile JSON and near-JSON by kind; each makes a text of about the given number of
characters.
"""


@dataclass
class CheckedFields:
    """Result of validating all fields with one value: their number, the slowest validation, and faults."""

    fields: int = 0
    slowest_seconds: float = 0.0
    unworded: list[str] = field(default_factory=list)
    """Fields without a finding, or that made validation fail."""


def check_every_field(text: str) -> CheckedFields:
    """Set each config field of each node type to the JSON `text`, one at a time, and validate; return the faults.

    A text that is refused as JSON is refused for all fields alike, which is no fault.
    """
    checked = CheckedFields()
    for node_type in CATALOG.node_types.values():
        properties = node_type.config_schema["properties"]
        assert isinstance(properties, dict)
        example = node_type.examples[0]["config"]
        assert isinstance(example, dict)
        for name in properties:
            checked.fields += 1
            since = perf_counter()
            try:
                findings = _findings(node_type.type, {**example, name: decode_json(text.encode())})
            except InvalidJson:
                findings = []
            except Exception as error:  # noqa: BLE001 - every error is a finding
                checked.unworded.append(f"{node_type.type}.{name}: {error!r}"[:300])
                continue
            checked.slowest_seconds = max(checked.slowest_seconds, perf_counter() - since)
            if not all(findings):
                checked.unworded.append(f"{node_type.type}.{name}: a finding without words")
    return checked


def _findings(type_name: str, config: dict[str, Json]) -> list[str]:
    """Return the messages and suggestions of validation for a graph with one node of a type and this config."""
    node_type = CATALOG.get(type_name)
    start = [] if node_type.is_trigger else [GraphNode("start", "manual")]
    edges = (
        [GraphEdge("edge", "start", "node", target_port=node_type.inputs[0])]
        if start and node_type.inputs
        else []
    )
    found = validate_graph(ParsedGraph([*start, GraphNode("node", type_name, config=config)], edges), CATALOG)
    return [
        part for finding in (*found.errors, *found.warnings) for part in (finding.message, finding.suggestion)
    ]
