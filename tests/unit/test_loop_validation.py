"""Validation of graphs with loops."""

from __future__ import annotations

import pytest

from engine.findings import MAX_FINDINGS, GraphFinding
from engine.graph import ParsedGraph
from engine.program import WorkflowProgram
from engine.run_errors import InvalidDefinition
from engine.validation import find_errors, validate_graph
from engine.values import Json
from nodes import catalog

CATALOG = catalog.load_catalog()


def parse_drawing(drawing: str, **configs: Json) -> ParsedGraph:
    """Return a graph drawn as `start > loop; loop:continue > text`: a node's type is its id without digits."""
    ids: dict[str, None] = {"start": None}
    edges: list[Json] = []
    for path in drawing.split(";"):
        source, *others = (step.strip() for step in path.split(">"))
        for target in others:
            ids |= {source.partition(":")[0]: None, target.partition(":")[0]: None}
            node_id, _, port = source.partition(":")
            edges.append(
                {"id": f"{source} > {target}", "source": node_id, "sourcePort": port, "target": target}
            )
            source = target
    types = {"start": "manual", "text": "template", "both": "merge", "route": "conditional"}
    standard: dict[str, Json] = {
        "text": {"text": "x"},
        "route": {"condition": {"left": 1, "operator": "equals", "right": 1}},
    }
    nodes: list[Json] = []
    for node_id in ids:
        kind = node_id.rstrip("0123456789")
        config = configs.get(node_id, standard.get(kind, {}))
        nodes.append({"id": node_id, "type": types.get(kind, kind), "config": config})
    return ParsedGraph.from_stored({"nodes": nodes, "connections": edges})


def find_graph_errors(drawn: ParsedGraph) -> list[GraphFinding]:
    return list(find_errors(drawn, CATALOG).errors)


SOUND = [
    "start > loop; loop:continue > text1 > text2; loop:done > text3",
    "start > loop; loop:continue > both; loop:continue > text1 > both; loop:error > text2; loop:done > text2",
    "start > loop1; loop1:continue > loop2; loop2:continue > text1; loop2:done > text2; loop1:done > text3",
    "start > loop1; loop1:done > loop2; loop2:continue > text1",
    "start > loop1; start > loop2;loop1:continue > text1; loop2:continue > text2; loop1:done > text; loop2:done > text",
    "start > loop1; loop1:continue > loop2; loop2:continue > loop3; loop3:continue > loop4; loop4:continue > text1",
]


@pytest.mark.parametrize("drawing", SOUND)
def test_the_body_of_a_loop_is_a_part_of_its_own(drawing: str) -> None:
    drawn = parse_drawing(drawing)
    assert find_graph_errors(drawn) == []
    WorkflowProgram.compile(drawn, CATALOG, CATALOG.implementation)


@pytest.mark.parametrize(
    ("drawing", "connection_id"),
    [
        ("start > loop; loop:continue > text1 > text2; loop:done > text2", "loop:done > text2"),
        ("start > loop; loop:continue > text1; start > text1", "start > text1"),
        ("start > loop; loop:continue > text1; loop:error > text1", "loop:error > text1"),
        (
            "start > loop1; loop1:continue > loop2; loop2:continue > text1; loop2:done > text1",
            "loop2:done > text1",
        ),
        (
            "start > loop1; start > loop2; loop1:continue > text1 > text3; loop2:continue > text2 > text3",
            "text2 > text3",
        ),
        ("start > loop1; loop1:continue > loop2; loop2:continue > text1; start > text1", "start > text1"),
    ],
    ids=[
        "a body that leads out",
        "from before",
        "its own error",
        "the inner done",
        "two bodies",
        "two levels",
    ],
)
def test_nothing_leads_into_a_body_from_outside(drawing: str, connection_id: str) -> None:
    drawn = parse_drawing(drawing)
    (error,) = find_graph_errors(drawn)
    assert (error.type, error.connection_id) == ("loop-body-entered", connection_id)
    assert "done" in error.suggestion
    with pytest.raises(InvalidDefinition, match="body of a loop"):
        WorkflowProgram.compile(drawn, CATALOG, CATALOG.implementation)


@pytest.mark.parametrize(
    ("drawing", "back"),
    [
        ("start > loop; loop:continue > text1 > loop", "text1 > loop"),
        (
            "start > loop; loop:continue > text1 > route; route:true > text2 > loop; loop:done > text3",
            "text2 > loop",
        ),
        ("start > loop; loop:continue > loop", "loop:continue > loop"),
    ],
)
def test_a_connection_back_to_the_loop_is_a_cycle_to_be_opened_right_there(drawing: str, back: str) -> None:
    (error,) = find_graph_errors(parse_drawing(drawing))
    assert (error.type, error.node_id) == ("cycle", "loop")
    assert "ends by itself" in error.suggestion
    assert "done" in error.suggestion
    assert error.fix is not None
    assert error.fix.as_json() == {"action": "remove-connection", "connectionId": back}


def test_loops_stand_four_deep_at_most() -> None:
    drawn = parse_drawing(
        "start > loop1"
        + "".join(f"; loop{n}:continue > loop{n + 1}" for n in range(1, 5))
        + "; loop5:continue > text"
    )
    (error,) = find_graph_errors(drawn)
    assert (error.type, error.node_id) == ("loops-too-deep", "loop5")
    with pytest.raises(InvalidDefinition, match="Loops nest more than 4 deep"):
        WorkflowProgram.compile(drawn, CATALOG, CATALOG.implementation)


@pytest.mark.parametrize(
    ("drawing", "path", "is_found"),
    [
        ("start > loop; loop:continue > text", "item.a", True),
        ("start > loop; loop:continue > text", "index", True),
        ("start > loop; loop:continue > text", "data.a.b", True),
        ("start > loop; loop:continue > text", "nodes.loop.item.a", True),
        ("start > loop; loop:continue > text", "nodes.loop.index", True),
        ("start > loop; loop:continue > text", "nodes.loop.results", False),
        ("start > loop; loop:done > text", "nodes.loop.results[0].a", True),
        ("start > loop; loop:done > text", "nodes.loop.item", False),
        ("start > loop; loop:done > text", "data.errors[0].error.message", True),
        ("start > loop; loop:done > text", "data.errors[0].message", False),
        ("start > loop; loop:continue > text1; loop:done > text", "nodes.text1.text", False),
        ("start > loop; loop:continue > text1 > text", "nodes.text1.text", True),
        ("start > loop; loop:done > text", "item", False),
        ("start > text", "index", False),
        ("start > loop1; loop1:continue > loop2; loop2:continue > text", "nodes.loop1.item.a", True),
        ("start > loop1; loop1:continue > loop2; loop2:done > text", "item", True),
    ],
)
def test_paths_are_checked_by_where_they_stand(drawing: str, path: str, is_found: bool) -> None:  # noqa: FBT001 - a parameter
    validation = validate_graph(parse_drawing(drawing, text={"text": f"{{{{ {path} }}}}"}), CATALOG)
    assert validation.errors == ()
    assert [finding.type for finding in validation.warnings] == ([] if is_found else ["unresolved-mapping"])


def test_item_is_available_outside_loops_in_expressions_evaluated_per_item() -> None:
    config: Json = {"text": "", "items": [1], "each": "{{ item }} at {{ index }}"}
    assert validate_graph(parse_drawing("start > text", text=config), CATALOG).warnings == ()


def test_ten_thousand_loops_are_checked_in_linear_time() -> None:
    drawing = "start > loop0; " + "; ".join(f"loop{n}:continue > loop{n + 1}" for n in range(10_000))
    assert len(find_graph_errors(parse_drawing(drawing))) == 1
    side_by_side = "; ".join(f"start > loop{n}; loop{n}:continue > text" for n in range(5_000))
    assert {error.type for error in find_graph_errors(parse_drawing(side_by_side))} == {"loop-body-entered"}
    assert len(find_graph_errors(parse_drawing(side_by_side))) == MAX_FINDINGS
