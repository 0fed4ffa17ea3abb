"""The reference of the node types, as the catalogue describes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from engine.node import Compile, NodeType
from nodes import catalog

if TYPE_CHECKING:
    from engine.values import Json

HEADING = """\
# Nodes

Every type of node, as the catalogue of the server has it; `make docs` writes this page. `{{ path }}` may stand
wherever a config takes a value, and a field marked *computed* takes `{"$op": …}` besides. Each node has the port
`error` too, which is taken when it fails for good. *Effect* is what running a node does to the world: after a crash,
`pure` and `read` nodes may simply run again, while what a `write` node is about to do, and what it did, is recorded
around it.
"""
CATEGORIES: Mapping[str, str] = {
    "triggers": "Triggers",
    "sources": "Sources",
    "transform": "Transform",
    "control": "Control",
    "io": "In and out",
    "ai": "AI",
}


def reference() -> str:
    """Return the page: the types by category, each with its config and an example."""
    node_types = catalog.load().node_types.values()
    parts = [HEADING]
    for category, title in CATEGORIES.items():
        described = [each for each in node_types if each.category == category]
        if described:
            links = ", ".join(f"[{each.type}](#{each.type})" for each in described)
            parts += [f"## {title}\n", f"{links}\n", *map(_described, described)]
    return "\n".join(parts)


def _described(node_type: NodeType) -> str:
    lines = [f"### {node_type.type}\n", f"{node_type.description}\n"]
    if not node_type.runnable:
        lines.append("It can be drawn, but not run on this server.\n")
    lines.append(f"Version {node_type.version} · effect {_effect(node_type)} · {_ports(node_type)}\n")
    if node_type.input_description:
        lines.append(f"**Input.** {node_type.input_description}\n")
    lines.append(f"**Output.** {node_type.output.description}\n")
    rows = list(_rows(node_type))
    if rows:
        lines += ["| config | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    lines += ["```json", _example(node_type.examples[0]), "```\n"]
    return "\n".join(lines)


def _effect(node_type: NodeType) -> str:
    rule = node_type.effect
    if rule.deciding_field is None:
        return rule.default.value
    cases = ", ".join(f"{effect} for {value}" for value, effect in rule.cases.items())
    return f"{rule.default} (by `{rule.deciding_field}`: {cases})"


def _ports(node_type: NodeType) -> str:
    inputs, outputs = (
        ", ".join(f"`{port}`" for port in ports) or "none" for ports in (node_type.inputs, node_type.outputs)
    )
    named = f", and those that `{node_type.outputs_from}` names" if node_type.outputs_from else ""
    return f"ports in: {inputs}; out: {outputs}{named}"


def _rows(node_type: NodeType) -> Iterator[str]:
    for name, schema in _properties(node_type.config_schema).items():
        compiled = node_type.compiled.get(name)
        kind = "condition" if compiled is Compile.CONDITION else _kind(schema)
        if compiled is Compile.VALUE:
            kind += ", computed"
        yield _row(name, schema, kind, is_required=name in _required(node_type.config_schema))
        if compiled is not Compile.CONDITION:
            yield from _inner_rows(name, schema, node_type.compiled)


def _inner_rows(name: str, schema: Mapping[str, Any], compiled: Mapping[str, Compile]) -> Iterator[str]:
    """Return the rows of the fields of an object, and of the objects in a list."""
    items = schema.get("items")
    for prefix, inner in ((name, schema), (f"{name}[]", items if isinstance(items, dict) else {})):
        for field, of_field in _properties(inner).items():
            path = f"{prefix}.{field}"
            is_condition = compiled.get(path) is Compile.CONDITION
            kind = "condition" if is_condition else _kind(of_field)
            yield _row(path, of_field, kind, is_required=field in _required(inner))
            if not is_condition:
                yield from _inner_rows(path, of_field, compiled)


def _row(name: str, schema: Mapping[str, Any], kind: str, *, is_required: bool) -> str:
    default = f"`{_inline(schema['default'])}`" if "default" in schema else ""
    cells = [f"`{name}`", kind, "*required*" if is_required else default, schema.get("description", "")]
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _kind(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{_inline(option)}`" for option in schema["enum"])
    types = schema.get("type", "any value")
    kind = types if isinstance(types, str) else " or ".join(types)
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        return f"{kind}, {least:,} to {most:,}"
    return kind


def _inline(value: Json) -> str:
    return value if isinstance(value, str) and value.isprintable() and value else _written(value)


def _written(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _example(example: Mapping[str, Json]) -> str:
    """Return an example with one line for each part; a port only where it isn't the usual one."""
    parts = {name: example[name] for name in ("config", "input", "output", "error") if name in example}
    if example["port"] != "output":
        parts["port"] = example["port"]
    lines = [f"  {_written(name)}: {_written(value)}" for name, value in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def _properties(schema: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(schema.get("properties", {}))


def _required(schema: Mapping[str, Any]) -> list[str]:
    return list(schema.get("required", []))
