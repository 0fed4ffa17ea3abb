"""Arbitrary configs: validation finds the fault, or the node fails with a reason. No other error is ever
raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.expressions import ExpressionError
from engine.graph import GraphEdge, GraphNode, ParsedGraph
from engine.node_api import NodeType
from engine.program import WorkflowProgram
from engine.run_errors import NodeError
from engine.services import HttpResponse
from engine.validation import validate_graph
from engine.values import InvalidJson, Json
from nodes import catalog
from tests.node_calls import call

CATALOG = catalog.load_catalog()
EXAMPLES_OF_A_TYPE = 12
FAILURES = (NodeError, ExpressionError, InvalidJson)
"""Errors with which the engine ends a node in an authored message."""


class FailingNetwork:
    """A network in which every request fails."""

    async def request(self, method: str, url: str, **_more: object) -> HttpResponse:
        raise NodeError(f"{method} {url} was not answered")


TEMPLATES = st.sampled_from(
    [
        *("{{ data }}", "{{ data.x }}", "{{ item.a }} {{ index }}", "{{ nodes.no.way }}"),
        *("{{", "{{ data", "{{}}", "{{ data..x }}"),
    ]
)
ODD = st.sampled_from(
    [
        *("", " ", ".", "[", "(", "\\", "*", "%", "%Q", "a" * 300, "\u0301", "💥"),
        *("-1", "1e999", "2026-02-30", "[]", "<a", "UTC"),
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 10**6, 10**18, -(2**63), 0.5, -0.0, 1e308]),
    ODD,
    TEMPLATES,
)
COMPUTED = st.builds(
    lambda operation, arguments: {"$op": operation, "args": arguments},
    st.sampled_from(["add", "concat", "default", "length", "no-such", "", 1]),
    st.lists(SCALARS, max_size=3),
)
COMPARED = st.builds(
    lambda left, operator, right: {"left": left, "operator": operator, "right": right},
    SCALARS,
    st.sampled_from(["equals", "less-than", "contains", "matches", "in", "exists", "no-such", None]),
    SCALARS,
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS | COMPUTED | COMPARED,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "name", "field", "port", "as", "all", "$op", ""]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@st.composite
def draw_broken_config(draw: st.DrawFn, node_type: NodeType) -> dict[str, Json]:
    """Return the config of an example with up to three of its fields replaced, removed or added, at any depth."""
    example = draw(st.sampled_from(node_type.examples))
    config = copy.deepcopy(example["config"])
    assert isinstance(config, dict)
    for _ in range(draw(st.integers(1, 3))):
        _break(draw, config, list(_property_names(node_type.config_schema)))
    return config


def _break(draw: st.DrawFn, value: Any, names: list[str]) -> None:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        place: Any = draw(st.sampled_from([*value, *names, "nmae"]))
    elif value:
        place = draw(st.integers(0, len(value) - 1))
    else:
        value.append(draw(VALUES))
        return
    inner = value.get(place) if isinstance(value, dict) else value[place]
    if isinstance(inner, dict | list) and draw(st.booleans()):
        _break(draw, inner, [])
    elif draw(st.integers(0, 4)) == 0:
        if not isinstance(value, dict) or place in value:
            del value[place]
    else:
        value[place] = draw(VALUES)


def _property_names(schema: Mapping[str, Json]) -> Mapping[str, Json]:
    properties = schema["properties"]
    assert isinstance(properties, dict)
    return properties


@pytest.mark.parametrize("node_type", CATALOG.node_types.values(), ids=CATALOG.types())
@settings(max_examples=EXAMPLES_OF_A_TYPE)
@given(data=st.data())
def test_a_broken_config_is_found_or_fails_with_a_reason(node_type: NodeType, data: st.DataObject) -> None:
    config = data.draw(draw_broken_config(node_type))
    node = GraphNode("node", node_type.type, config=config)
    start = [] if node_type.is_trigger else [GraphNode("start", "manual")]
    edges = (
        [GraphEdge("edge", "start", "node", target_port=node_type.inputs[0])]
        if start and node_type.inputs
        else []
    )
    found = validate_graph(ParsedGraph([*start, node], edges), CATALOG)
    assert all(finding.message and finding.suggestion for finding in (*found.errors, *found.warnings))
    if not found.is_valid or not node_type.runnable:
        return
    program = WorkflowProgram.compile(ParsedGraph([*start, node], edges), CATALOG, CATALOG.implementation)
    if program.nodes["node"].missing is None:
        arriving = data.draw(st.sampled_from([example["input"] for example in node_type.examples]) | VALUES)
        with contextlib.suppress(*FAILURES):
            asyncio.run(call(node_type.type, config, arriving, http=FailingNetwork()))
