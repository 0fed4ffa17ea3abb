"""Generator of the page on expressions; its examples are data of this module, and tests execute each of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from engine import conditions, expressions
from engine.node_api import FieldCompilation
from engine.operations import OPERATIONS
from nodes import catalog

if TYPE_CHECKING:
    from engine.values import Json

SCOPE: Final[Mapping[str, Json]] = {
    "data": {
        "name": "Ada",
        "nickname": None,
        "odd key": 1,
        "orders": [{"id": 7, "amount": 30}, {"id": 8, "amount": 12.5}],
    },
    "trigger": {"body": {"customer": "acme"}},
    "nodes": {"fetch": {"status": 200}},
    "execution": {"id": "exec_1", "workflowId": "wf_1", "startedAt": "2026-01-02T03:04:05Z"},
    "approval": {},
}
"""Data for the examples of paths and templates."""

PATHS: Final[tuple[tuple[str, Json], ...]] = (
    ("data.name", "Ada"),
    ("data.orders[0].amount", 30),
    ("data.orders[-1].id", 8),
    ("data.orders.1.id", 8),
    ('data["odd key"]', 1),
    ("trigger.body.customer", "acme"),
    ("nodes.fetch.status", 200),
    ("execution.id", "exec_1"),
)
TEMPLATES: Final[tuple[tuple[Json, Json], ...]] = (
    ("Dear {{ data.name }}", "Dear Ada"),
    ("{{ data.orders }}", [{"id": 7, "amount": 30}, {"id": 8, "amount": 12.5}]),
    ("First: {{ data.orders[0] }}", 'First: {"id":7,"amount":30}'),
    ("{{ data.orders[0].amount }}", 30),
    ({"to": "{{ data.name }}", "count": 2}, {"to": "Ada", "count": 2}),
)
FALLBACKS: Final[tuple[tuple[Json, Json], ...]] = (
    ("{{ data.nickname ?? data.name }}", "Ada"),
    ('{{ data.city ?? "unknown" }}', "unknown"),
    ("{{ data.city ?? null }}", None),
    ('{{ data.nickname ?? data.city ?? {"a": [1]} }}', {"a": [1]}),
)
OPERATION_EXAMPLES: Final[Mapping[str, tuple[list[Json], Json]]] = {
    "add": ([1, 2, 3.5], 6.5),
    "subtract": ([5, 3], 2),
    "multiply": ([2, 3, 4], 24),
    "divide": ([7, 2], 3.5),
    "modulo": ([-7, 3], 2),
    "round": ([2.675, 2], 2.68),
    "floor": ([-1.5], -2),
    "ceil": ([1.2], 2),
    "abs": ([-3], 3),
    "min": ([3, 1.5, 2], 1.5),
    "max": ([[3, 5]], 5),
    "sum": ([[1, 2, 3]], 6),
    "format-number": ([1234567.891, 2], "1,234,567.89"),
    "concat": (["a", 1, True], "a1true"),
    "lower": (["Ada"], "ada"),
    "upper": (["Ada"], "ADA"),
    "trim": (["  a b "], "a b"),
    "replace": (["a.b.c", ".", "-"], "a-b-c"),
    "split": (["a, b", ", "], ["a", "b"]),
    "join": ([["a", 1], "-"], "a-1"),
    "substring": (["workflow", 4], "flow"),
    "pad": (["7", 3, "0"], "007"),
    "length": ([[1, 2, 3]], 3),
    "first": ([[1, 2]], 1),
    "last": ([[1, 2]], 2),
    "slice": ([[1, 2, 3], 0, -1], [1, 2]),
    "get": ([{"a": 1}, "b", "none"], "none"),
    "flatten": ([[1, [2, [3]]]], [1, 2, [3]]),
    "unique": ([[2, 1, 2.0]], [2, 1]),
    "reverse": ([[1, 2]], [2, 1]),
    "sort": ([[{"n": 2}, {"n": 1}], "n", "ascending"], [{"n": 1}, {"n": 2}]),
    "range": ([1, 7, 2], [1, 3, 5]),
    "merge": ([{"a": 1, "b": 1}, {"b": 2}], {"a": 1, "b": 2}),
    "pick": ([{"a": 1, "b": 2}, ["b"]], {"b": 2}),
    "omit": ([{"a": 1, "b": 2}, ["b"]], {"a": 1}),
    "keys": ([{"b": 1, "a": 2}], ["b", "a"]),
    "values": ([{"b": 1, "a": 2}], [1, 2]),
    "parse-date": (["2026-07-01 12:00", "Europe/Berlin"], "2026-07-01T10:00:00Z"),
    "format-date": (["2026-01-02T23:30:00Z", "%d.%m.%Y %H:%M", "Europe/Berlin"], "03.01.2026 00:30"),
    "add-time": (["2026-01-31T10:00:00Z", 1, "months"], "2026-02-28T10:00:00Z"),
    "date-diff": (["2026-01-01T00:00:00Z", "2026-01-02T12:00:00Z", "days"], 1.5),
    "default": ([None, 1], 1),
    "coalesce": ([None, 0, 1], 0),
    "to-number": (["1.5e3"], 1500.0),
    "to-text": ([[1, {"a": True}]], '[1,{"a":true}]'),
    "to-boolean": (["TRUE"], True),
    "from-json": (['{"a": [1]}'], {"a": [1]}),
    "to-json": ([{"a": 1}], '{"a":1}'),
    "base64-encode": (["Ada:secret"], "QWRhOnNlY3JldA=="),
    "base64-decode": (["QWRhOnNlY3JldA"], "Ada:secret"),
}
"""Arguments and result of each operation."""
OPERATOR_EXAMPLES: Final[Mapping[str, tuple[Json, Json]]] = {
    "equals": (1, 1.0),
    "not-equals": ("1", 1),
    "greater-than": (2, 1),
    "greater-or-equal": ("b", "a"),
    "less-than": (1, 2),
    "less-or-equal": (2, 2),
    "contains": ([1, 2], 2),
    "not-contains": ("Ada", "x"),
    "starts-with": ("Ada", "A"),
    "ends-with": ("Ada", "da"),
    "in": ("paid", ["paid", "open"]),
    "not-in": (3, [1, 2]),
    "divisible-by": (10, 5),
    "exists": (0, None),
    "not-exists": (None, None),
    "is-empty": ("", None),
    "is-not-empty": ([0], None),
    "is-true": (True, None),
    "is-false": (False, None),
}
"""A left and a right value for which each operator is true; unary operators have no right value."""
JOINED_CONDITION: Final[Json] = {
    "all": [
        {"left": "{{ data.name }}", "operator": "equals", "right": "Ada"},
        {
            "any": [
                {"left": "{{ data.orders[0].amount }}", "operator": ">", "right": 20},
                {"left": "{{ data.vip }}", "operator": "is-true"},
            ]
        },
        {"not": {"left": "{{ data.city }}", "operator": "exists"}},
    ]
}
"""A condition that is true in `SCOPE`."""
LIMITS: Final[Mapping[str, int]] = {
    "Characters of a path": expressions.MAX_PATH_LENGTH,
    "Steps of a path, its root included": expressions.MAX_PATH_STEPS,
    "Paths that one expression joins by `??`": expressions.MAX_ALTERNATIVES,
    "Operations in one value": expressions.MAX_OPERATIONS,
    "Characters and list elements that one value produces": expressions.MAX_WRITTEN,
    "Levels of `all`, `any` and `not`": conditions.MAX_NESTING,
    "Comparisons in one condition": conditions.MAX_COMPARISONS,
}


def build_parts() -> dict[str, str]:
    """Return the generated parts of docs/expressions.md by the names of their marks; writes nothing."""
    return {
        "scope": _code_block(SCOPE),
        "paths": _format_table(("path", "value"), map(_example_row, PATHS)),
        "templates": _format_table(("template", "value"), map(_example_row, TEMPLATES)),
        "fallbacks": _format_table(("template", "value"), map(_example_row, FALLBACKS)),
        "computed-fields": _format_table(("node", "fields"), _field_rows(FieldCompilation.VALUE)),
        "operations": _format_table(
            ("operation", "arguments", "result", "example: `args`", "value"), _operation_rows()
        ),
        "condition-fields": _format_table(("node", "fields"), _field_rows(FieldCompilation.CONDITION)),
        "operators": _format_table(("operator", "symbol", "compares", "example"), _operator_rows()),
        "joined-condition": _code_block(JOINED_CONDITION),
        "expression-limits": _format_table(
            ("limit", "value"), ((name, f"{value:,}") for name, value in LIMITS.items())
        ),
    }


def _format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _code_block(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"


def _example_row(example: tuple[Json, Json]) -> tuple[str, str]:
    source, value = example
    return _format_code(source if isinstance(source, str) else _format_json(source)), _format_code(
        _format_json(value)
    )


def _field_rows(kind: FieldCompilation) -> Iterator[tuple[str, str]]:
    """Yield a row for each node type that has fields of this kind."""
    for node_type in catalog.load_catalog().node_types.values():
        fields = [name for name, compiled in node_type.compiled.items() if compiled is kind]
        if fields:
            yield f"[`{node_type.type}`](nodes.md#{node_type.type})", ", ".join(map(_format_code, fields))


def _operation_rows() -> Iterator[tuple[str, ...]]:
    """Yield a row for each operation: name, number of arguments, result, and an example."""
    for name, operation in sorted(OPERATIONS.items()):
        arguments, value = OPERATION_EXAMPLES[name]
        count = operation.arity.removesuffix("s").removesuffix(" argument")
        yield (
            _format_code(name),
            count,
            operation.summary,
            _format_code(_format_json(arguments)),
            _format_code(_format_json(value)),
        )


def _operator_rows() -> Iterator[tuple[str, ...]]:
    """Yield a row for each operator of conditions: name, symbol, kind of values, and an example."""
    symbols = {name: symbol for symbol, name in conditions.SYMBOLS.items()}
    for name, needed in conditions.OPERATORS.items():
        left, right = OPERATOR_EXAMPLES[name]
        example = (
            f"{_format_json(left)} {name} {_format_json(right)}" if needed else f"{_format_json(left)} {name}"
        )
        symbol = _format_code(symbols[name]) if name in symbols else ""
        yield _format_code(name), symbol, needed or "one value", _format_code(example)


def _format_json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _format_code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|")
