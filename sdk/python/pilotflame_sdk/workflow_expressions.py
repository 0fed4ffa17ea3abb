"""Expressions in configs of nodes: paths that Python's attributes and indexes build."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

_FIELD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")


class WorkflowExpression:
    """Expression that the server evaluates in a run, as `WorkflowExpression("data").user["first name"]`.

    Attributes and indexes add steps to its path. Inside of a longer text, `f"Dear {start.data.body.name}"` is a
    template.
    """

    __slots__ = ("_text",)

    _text: str

    def __init__(self, text: str) -> None:
        # `__setattr__` would be a field of the path.
        object.__setattr__(self, "_text", text)

    def __getattr__(self, name: str) -> WorkflowExpression:
        if name.startswith("__"):
            raise AttributeError(name)  # Protocols of Python, such as copying.
        return self[name]

    def __getitem__(self, step: str | int) -> WorkflowExpression:
        if isinstance(step, int):
            return WorkflowExpression(f"{self._text}[{step}]")
        if _FIELD.match(step):
            return WorkflowExpression(f"{self._text}.{step}")
        quoted = step.replace("\\", "\\\\").replace('"', '\\"')
        return WorkflowExpression(f'{self._text}["{quoted}"]')

    def __or__(self, other: object) -> WorkflowExpression:
        """Return an expression with a fallback: `start.data.city | "unknown"`, for missing values and null."""
        text = other._text if isinstance(other, WorkflowExpression) else json.dumps(other, ensure_ascii=False)
        return WorkflowExpression(f"{self._text} ?? {text}")

    def __str__(self) -> str:
        return f"{{{{ {self._text} }}}}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._text}>"

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} has a value in runs alone: use a node such as conditional")

    # Python would ask for index after index, and each has an answer.
    __iter__ = None


def render_expressions(value: Any) -> Any:  # noqa: ANN401 - any JSON, with expressions
    """Return a value with expressions as templates, and with plain lists and dicts."""
    if isinstance(value, WorkflowExpression):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): render_expressions(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [render_expressions(one) for one in value]
    return value
