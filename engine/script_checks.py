"""Syntax checks of scripts in the configs of nodes; scripts are parsed and never executed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from engine.findings import FindingType, GraphFinding

if TYPE_CHECKING:
    from engine.graph import GraphNode
    from engine.node_api import NodeType

MAX_SCRIPT_CHARACTERS: Final = 65_536
MAX_CHARACTERS: Final = 262_144
"""Maximum size of all parsed scripts of one graph, at a microsecond per character; others are checked at run
time.
"""


class ScriptChecker:
    """Checker of the scripts of one graph, within a limited time."""

    def __init__(self) -> None:
        self._characters = 0
        self._read: dict[str, str | None] = {}

    def findings(self, node: GraphNode, node_type: NodeType) -> Iterator[GraphFinding]:
        """Yield a finding for each field with invalid Python."""
        properties = node_type.config_schema.get("properties")
        for name, schema in properties.items() if isinstance(properties, dict) else ():
            source = node.config.get(name)
            if not isinstance(schema, dict) or schema.get("x-language") != "python":
                continue
            if isinstance(source, str) and (wrong := self._syntax_problem(source)) is not None:
                message = f'Node "{node.label}" ({node.type}): config.{name}: {wrong}'
                yield GraphFinding(FindingType.INVALID_CONFIG, message, "Fix the script.", node.id)

    def _syntax_problem(self, source: str) -> str | None:
        if source not in self._read:
            self._characters += len(source)
            if len(source) > MAX_SCRIPT_CHARACTERS or self._characters > MAX_CHARACTERS:
                return None
            self._read[source] = _syntax_error_of(source)
        return self._read[source]


def _syntax_error_of(source: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (RecursionError, MemoryError):
        return "it is nested too deeply"
    except ValueError as error:
        return str(error)
    return None
