"""Generator of the reference of node types from the catalog."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from engine.node_api import CONTINUE, DONE, OUTPUT, FieldCompilation, NodeType
from nodes import catalog

if TYPE_CHECKING:
    from engine.values import Json

HEADING = """\
# Nodes

This page describes every node type of the server's catalog; `make docs` generates it.

- [Templates](expressions.md#templates) such as `{{ path }}` may stand wherever a config takes a value, and
  `{{ path ?? "none" }}` where the value may be missing.
- Fields marked *computed* also take [operations](expressions.md#operations), `{"$op": …}`.
- Fields of the type *condition* take a [condition](expressions.md#conditions).
- *Effect* is the effect of a node on the outside world. After a crash, `pure` and `read` nodes may run again. The input
  of a `write` node is committed before it runs, and its result before anything follows it.
- Every node also has the port `error`, which is taken when the node fails for good.

Each example is the body of a `POST /api/v1/workflows/{id}/execute` request, for any workflow that is a draft or active.
Its `definition` replaces the graph of that workflow for this run, and `pinned` outputs arrive at the node. The JSON
below the request is the output of the node `step`, as the execution's `outputs` show it. `ds_001` is the id of a data
source. Nodes that can only be drawn are shown with their config and input.
"""
STEP = "step"
BLOB = "$blob"
LINES_DOWN_TO = 3
SHORT = 80
CATEGORIES: Mapping[str, str] = {
    "triggers": "Triggers",
    "sources": "Sources",
    "destinations": "Destinations",
    "transform": "Transform",
    "control": "Control",
    "io": "In and out",
    "ai": "AI",
}


def build_reference() -> str:
    """Return the text of the page: node types by category, each with its config and an example."""
    node_types = catalog.load_catalog().node_types.values()
    parts = [HEADING]
    for category, title in CATEGORIES.items():
        described = [each for each in node_types if each.category == category]
        if described:
            links = ", ".join(f"[{each.type}](#{each.type})" for each in described)
            parts += [f"## {title}\n", f"{links}\n", *map(_node_section, described)]
    return "\n".join(parts)


def _node_section(node_type: NodeType) -> str:
    """Return the section about a node type, in Markdown."""
    lines = [f"### {node_type.type}\n", f"{node_type.description}\n"]
    if not node_type.runnable:
        lines.append("This node can be drawn, but not run on this server.\n")
    lines.append(
        f"Version {node_type.version} · effect {_describe_effect(node_type)} · {_describe_ports(node_type)}\n"
    )
    if node_type.input_description:
        lines.append(f"**Input.** {node_type.input_description}\n")
    lines.append(f"**Output.** {node_type.output.description}\n")
    for version, earlier in node_type.earlier.items():
        lines.append(f"**Version {version}**, for nodes pinned to it: {earlier.changes}\n")
    rows = list(_config_rows(node_type))
    if rows:
        lines += ["| config | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    lines += _format_example(node_type)
    return "\n".join(lines)


def _describe_effect(node_type: NodeType) -> str:
    rule = node_type.effect
    if rule.deciding_field is None:
        return rule.default.value
    cases = ", ".join(f"{effect} for {value}" for value, effect in rule.cases.items())
    return f"{rule.default} (by `{rule.deciding_field}`: {cases})"


def _describe_ports(node_type: NodeType) -> str:
    inputs, outputs = (
        ", ".join(f"`{port}`" for port in ports) or "none" for ports in (node_type.inputs, node_type.outputs)
    )
    named = f", and those that `{node_type.outputs_from}` names" if node_type.outputs_from else ""
    return f"ports in: {inputs}; out: {outputs}{named}"


def _config_rows(node_type: NodeType) -> Iterator[str]:
    """Yield a row for each field of the config of a node type, and for fields within it."""
    for name, schema in _schema_properties(node_type.config_schema).items():
        compiled = node_type.compiled.get(name)
        kind = "condition" if compiled is FieldCompilation.CONDITION else _describe_type(schema)
        if compiled is FieldCompilation.VALUE:
            kind += ", computed"
        yield _config_row(name, schema, kind, is_required=name in _required_fields(node_type.config_schema))
        if compiled is not FieldCompilation.CONDITION:
            yield from _nested_rows(name, schema, node_type.compiled)


def _nested_rows(
    name: str, schema: Mapping[str, Any], compiled: Mapping[str, FieldCompilation]
) -> Iterator[str]:
    """Yield the rows of the fields of an object, or of the objects in a list; `name` is the path of the object."""
    items = schema.get("items")
    for prefix, inner in ((name, schema), (f"{name}[]", items if isinstance(items, dict) else {})):
        for field, of_field in _schema_properties(inner).items():
            path = f"{prefix}.{field}"
            is_condition = compiled.get(path) is FieldCompilation.CONDITION
            kind = "condition" if is_condition else _describe_type(of_field)
            yield _config_row(path, of_field, kind, is_required=field in _required_fields(inner))
            if not is_condition:
                yield from _nested_rows(path, of_field, compiled)


def _config_row(name: str, schema: Mapping[str, Any], kind: str, *, is_required: bool) -> str:
    """Return the table row of a config field: name, type, default, and description."""
    default = f"`{_format_inline(schema['default'])}`" if "default" in schema else ""
    cells = [f"`{name}`", kind, "*required*" if is_required else default, schema.get("description", "")]
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _describe_type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{_format_inline(option)}`" for option in schema["enum"])
    types = schema.get("type", "any value")
    kind = types if isinstance(types, str) else " or ".join(types)
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        return f"{kind}, {least:,} to {most:,}"
    return kind


def _format_inline(value: Json) -> str:
    return value if isinstance(value, str) and value.isprintable() and value else _format_value(value)


def _format_value(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def example_execute_body(node_type: NodeType) -> dict[str, Any]:
    """Return the body of an execute request that runs a node type with its first example as the node `step`."""
    example: dict[str, Any] = dict(node_type.examples[0])
    step = {"id": STEP, "nodeId": node_type.type, "config": example["config"]}
    if node_type.is_trigger:
        return {"definition": {"nodes": [step]}, "triggerInputs": example["input"]}
    if isinstance(example["input"], dict) and "blob" in example["input"]:
        return _file_execute_body(step, example["input"]["blob"][BLOB]["name"])
    pinned = example["input"] if node_type.joins else {"start": example["input"]}
    nodes = [{"id": parent, "nodeId": "set" if node_type.joins else "manual"} for parent in pinned]
    connections = [{"source": parent, "target": STEP} for parent in pinned]
    nodes.append(step)
    if node_type.loops:
        nodes.append({"id": "each", "nodeId": "log", "config": {"message": "{{ item }}"}})
        connections.append({"source": STEP, "sourcePort": CONTINUE, "target": "each"})
    return {"definition": {"nodes": nodes, "connections": connections}, "pinned": pinned}


def _file_execute_body(step: Mapping[str, Json], name: str) -> dict[str, Any]:
    """Return the body of an execute request in which another node fetches the file: blob references are valid in one
    run.
    """
    fetch = {"id": "fetch", "nodeId": "file-source", "config": {"key": name, "as": "blob"}}
    nodes = [{"id": "start", "nodeId": "manual"}, fetch, step]
    connections = [{"source": "start", "target": "fetch"}, {"source": "fetch", "target": STEP}]
    return {"definition": {"nodes": nodes, "connections": connections}}


def example_port(node_type: NodeType) -> Json:
    """Return the port by which the output of the first example leaves."""
    return DONE if node_type.loops else node_type.examples[0]["port"]


def _format_example(node_type: NodeType) -> Iterator[str]:
    """Yield the lines of the first example: the request, and the output or error."""
    example = node_type.examples[0]
    if node_type.runnable:
        yield from ("```json", _format_json(example_execute_body(node_type)), "```")
    else:
        yield from ("```json", _format_json({"config": example["config"], "input": example["input"]}), "```")
    if "error" in example:
        yield f"It fails: {example['error']}\n"
        return
    if example_port(node_type) != OUTPUT:
        yield f"By the port `{example_port(node_type)}`:"
    yield from ("```json", _format_value(example["output"]), "```\n")


def _format_json(value: Json, level: int = 0) -> str:
    """Return JSON text with a line for each part, down to the third level; shorter values are on one line."""
    in_one = _format_value(value)
    if not isinstance(value, dict | list) or (level > 0 and (level == LINES_DOWN_TO or len(in_one) <= SHORT)):
        return in_one
    indent, below = "  " * level, "  " * (level + 1)
    if isinstance(value, list):
        parts = [_format_json(item, level + 1) for item in value]
    else:
        parts = [f"{_format_value(key)}: {_format_json(item, level + 1)}" for key, item in value.items()]
    opening, closing = ("[", "]") if isinstance(value, list) else ("{", "}")
    return f"{opening}\n{below}{f',{chr(10)}{below}'.join(parts)}\n{indent}{closing}"


def _schema_properties(schema: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(schema.get("properties", {}))


def _required_fields(schema: Mapping[str, Any]) -> list[str]:
    return list(schema.get("required", []))
