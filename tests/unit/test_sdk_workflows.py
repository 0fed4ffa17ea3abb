"""Workflows that are built in Python, and the module of node types that `pilotflame pull` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from pilotflame_sdk import NodeConfig, TriggerConfig, Workflow, WorkflowExpression, node_code

from docs.tables import ROOT
from engine.expressions import compile_expression
from gateway.workflows import catalog as catalog_shapes
from nodes.catalog import load_catalog

HOSTILE = '"""\nraise SystemExit\n"""'
ODD_FIELDS = ("from", "a-b", "a_b", "aB", "1st", "²", "größe", "str", "__class__", "'''\"", "self", "Any")
USES = """
from typing import Literal

import acme_nodes as n
from pilotflame_sdk import NodeConfig, Workflow, WorkflowExpression

with Workflow("Thumbnails", status="active") as w:
    start = w.trigger(n.webhook())
    small = w.add(n.acme_resize(image=start.data.body.file, width=320), after=start)
    w.add(n.log(message="tiny"), after=small.port("too-small"))
    w.add(n.http_request(url=f"https://x/{start.data.body.file}", method="PUT"), after=small, retry=3)
    w.add(n.switch(cases=[{"port": "big", "equals": 7}]), after=[small, start]).port("big")
kind: NodeConfig[Literal["output", "too-small", "error"]] = n.acme_resize(image="a.png")
plain = w.add(NodeConfig("acme/resize", {"image": start.data["a.png"] | None}), after=start)
w.connect(plain.port("too-small"), small)
found: n.AcmeResizeOutput = small.data
size: n.AcmeResizeOutputSize = found.size
wide: WorkflowExpression = size.width
answer: n.HttpRequestOutput = w.add(n.http_request(url=f"{small.data.url}?{wide}", method="PUT")).data
w.add(n.log(message=answer.status))
"""
MISUSES = {
    'n.acme_resize(image="a.png", width="wide")': "arg-type",
    'n.acme_resize(image="a.png", hight=3)': "call-arg",
    "n.acme_resize(width=3)": "call-arg",
    'n.http_request(url="https://x", method="FETCH")': "arg-type",
    'n.switch(cases=[{"prot": "big"}])': "typeddict",
    'small.port("to-small")': "arg-type",
    "w.trigger(n.log(message='x'))": "arg-type",
    "wrong: n.HttpRequestOutput = small.data": "assignment",
    "wrong_size: n.AcmeResizeOutputSize = small.data.url": "assignment",
}


def describe_types() -> list[dict[str, Any]]:
    """Return the node types of the server as its API describes them, with custom ones, some of them hostile."""
    catalog = load_catalog()
    found = [
        msgspec.to_builtins(catalog_shapes.show_schema(catalog, catalog.get(name)))
        for name in catalog.types()
    ]
    odd = {name: {"type": "integer", "description": HOSTILE} for name in ODD_FIELDS}
    nested = {"type": "object", "additionalProperties": False, "properties": odd, "required": ["from"]}
    size = {"type": "object", "properties": {"width": {"type": "integer"}, **odd}}
    properties = {
        "image": {"type": "string", "description": "File to scale."},
        "width": {"type": "integer", "default": 1200},
    }
    return [
        *found,
        {
            **new_type(
                "acme/resize", {"properties": properties, "required": ["image"]}, ["output", "too-small"]
            ),
            "output": {"schema": {"type": "object", "properties": {"url": {"type": "string"}, "size": size}}},
        },
        new_type("acme/a-b", {"properties": {"one": nested, "Two": nested, **odd}}),
        new_type("acme-a/b", {"properties": {"choice": {"enum": [1, None, "x", HOSTILE]}, "o_ne": nested}}),
    ]


def new_type(name: str, config: dict[str, Any], outputs: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": name,
        "version": "1.2.0",
        "name": "Name",
        "description": f'Ends with a quote and \\ {HOSTILE}"',
        "isTrigger": False,
        "ports": {"inputs": ["input"], "outputs": outputs or ["output"]},
        "config": {"type": "object", **config},
    }


@pytest.fixture(scope="module")
def text() -> str:
    return node_code.write_module(describe_types())


@pytest.fixture(scope="module")
def n(text: str) -> ModuleType:
    module = ModuleType("acme_nodes")
    exec(compile(text, "acme_nodes.py", "exec"), vars(module))  # noqa: S102 - the module under test
    return module


# ── the module ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_module_has_a_function_for_each_type(text: str, n: ModuleType) -> None:
    described = describe_types()
    assert len(n.__all__) == len(described)
    assert node_code.write_module(described[::-1]) == text, "the order of the catalog changes nothing"
    assert {"acme__a_b", "acme_a__b", "http_request", "set"} <= {*n.__all__}
    made = n.acme_resize(image="a.png", width=320)
    assert (made.type, made.version, made.config) == (
        "acme/resize",
        "1.2.0",
        {"image": "a.png", "width": 320},
    )
    assert "image: File to scale." in n.acme_resize.__doc__
    assert n.email_send(data_source="@mail", from_="a@x", to=["b@x"]).config["from"] == "a@x"
    odd = n.acme__a_b(a_b=1, a_b_2=2, a_b_3=3, from_=4)
    assert odd.config == {"a-b": 1, "aB": 2, "a_b": 3, "from": 4}


def test_the_module_is_typed(text: str, tmp_path: Path) -> None:
    (tmp_path / "acme_nodes.py").write_text(text)
    lines = [f"{USES}\n", *(f"{one}\n" for one in MISUSES)]
    (tmp_path / "workflow.py").write_text("".join(lines))
    begin = lines[0].count("\n") + 1
    command = ["mypy", "--strict", "--python-version", "3.10", "--config-file", "", "--no-error-summary"]
    command += ["--no-pretty", "--hide-error-context", "--cache-dir", f"{ROOT}/.mypy_cache/workflows"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "workflow.py", "acme_nodes.py"],
        cwd=tmp_path,
        env={"MYPYPATH": f"{ROOT}/sdk/python"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {line.split(": ", 1)[0]: line for line in done.stdout.splitlines() if " error: " in line}
    wanted = {f"workflow.py:{begin + index}": code for index, code in enumerate(MISUSES.values())}
    assert {*found} == {*wanted}, done.stdout + done.stderr
    for place, code in wanted.items():
        assert code in found[place].rpartition("[")[2], found[place]


# ── the builder ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_workflow_is_its_nodes_and_connections(n: ModuleType) -> None:
    with Workflow("Thumbnails", status="active", settings={"timeout": 60}) as w:
        start = w.trigger(n.webhook())
        small = w.add(n.acme_resize(image=start.data.body.file, width=320), after=start, retry=3)
        w.add(n.log(message=f"tiny {small.data.url}"), after=small.port("too-small"), label="Tiny")
        w.add(n.log(message="big"), after=[small, small.port("error")], id="big")
        w.add(NodeConfig("acme/join"), after={"left": start, "right": small})
    assert w.definition() == {
        "name": "Thumbnails",
        "status": "active",
        "settings": {"timeout": 60},
        "nodes": [
            {"id": "webhook", "type": "webhook", "version": "1.0.0", "config": {}},
            {
                "id": "resize",
                "type": "acme/resize",
                "version": "1.2.0",
                "config": {"image": "{{ trigger.body.file }}", "width": 320},
                "retry": {"maxAttempts": 3},
            },
            {
                "id": "log",
                "type": "log",
                "version": "1.0.0",
                "config": {"message": "tiny {{ nodes.resize.url }}"},
                "label": "Tiny",
            },
            {"id": "big", "type": "log", "version": "1.0.0", "config": {"message": "big"}},
            {"id": "join", "type": "acme/join", "config": {}},
        ],
        "connections": [
            {"source": "webhook", "target": "resize"},
            {"source": "resize", "target": "log", "sourcePort": "too-small"},
            {"source": "resize", "target": "big"},
            {"source": "resize", "target": "big", "sourcePort": "error"},
            {"source": "webhook", "target": "join", "targetPort": "left"},
            {"source": "resize", "target": "join", "targetPort": "right"},
        ],
    }


def test_tools_and_models_are_connected_to_an_agent(n: ModuleType) -> None:
    w = Workflow("Agent")
    agent = w.add(n.agent(prompt="x"), after=w.trigger(n.manual()))
    tool = w.add(n.tool(name="search", description="Searches.", target={"type": "http-request"}))
    w.connect(tool, agent, port="tools")
    assert w.definition()["connections"][-1] == {"source": "tool", "target": "agent", "targetPort": "tools"}


def test_mistakes_are_refused_where_they_are_made(n: ModuleType) -> None:
    w, other = Workflow("One"), Workflow("Other")
    first = w.trigger(n.manual())
    foreign = other.trigger(n.manual())
    with pytest.raises(ValueError, match="has no port 'outptu': it has output, error"):
        first.port("outptu")
    with pytest.raises(ValueError, match="log has no input port 'left': it has input"):
        w.add(n.log(message="x"), after={"left": first})
    with pytest.raises(ValueError, match="manual has no input port 'input': it has none"):
        w.connect(first, first)
    branch = w.add(n.switch(cases=[{"port": "big", "equals": 7}]), after=first)
    assert branch.port("big").name == "big"
    with pytest.raises(ValueError, match="switch has no port 'bgi': it has big, default, error"):
        branch.port("bgi")
    with pytest.raises(ValueError, match="Name a port of switch, as in"):
        w.add(n.log(message="x"), after=branch)
    choice = w.add(n.conditional(condition={"left": 1, "operator": "is-true"}), after=first)
    with pytest.raises(ValueError, match="Name a port of conditional, as in"):
        w.add(n.log(message="x"), after=choice)
    with pytest.raises(ValueError, match="is no node of the workflow 'One'"):
        w.add(n.log(message="x"), after=foreign)
    with pytest.raises(ValueError, match="Two nodes have the id 'manual'"):
        w.add(n.log(message="x"), id="manual")
    assert [*w.nodes] == ["manual", "switch", "conditional"], "a refused node is not added"
    with pytest.raises(TypeError, match="has a value in runs alone"):
        assert first.data.body
    with pytest.raises(TypeError):
        iter(first.data.body)


@pytest.mark.parametrize(
    ("built", "text"),
    [
        (WorkflowExpression("data").a.b[0]["c-d"], "data.a.b[0].c-d"),
        (WorkflowExpression("data")['odd "\\ key'].x, 'data["odd \\"\\\\ key"].x'),
        (WorkflowExpression("data").a | WorkflowExpression("trigger").b | {"c": ["x"]}, None),
        (TriggerConfig("manual") and WorkflowExpression("item")[-1], "item[-1]"),
    ],
)
def test_expressions_are_those_of_the_server(built: WorkflowExpression, text: str | None) -> None:
    inner = str(built).removeprefix("{{ ").removesuffix(" }}")
    compile_expression(inner)
    assert inner == (text or 'data.a ?? trigger.b ?? {"c": ["x"]}')
