"""Static call graph of the gateway's source, from which the refusals of each function follow.

It follows names, annotations and the types of variables. It doesn't see calls of functions that are passed as
values.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import gateway

Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"


@dataclass(frozen=True)
class CodeDefinition:
    """Function, class or module, named by its module and the path in that."""

    module: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.path}".rstrip(".")


@dataclass
class SourceModule:
    """Source file: its definitions, and the definitions that its names mean."""

    name: str
    functions: dict[str, Function] = field(default_factory=dict)
    """Methods as `Class.name`."""
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    names: dict[str, CodeDefinition] = field(default_factory=dict)


class CallGraph:
    """Static call graph of the gateway's source."""

    def __init__(self) -> None:
        self._called: dict[CodeDefinition, Sequence[CodeDefinition]] = {}
        self._named: dict[CodeDefinition, frozenset[str]] = {}
        self._walked: dict[CodeDefinition, Sequence[ast.AST]] = {}
        self._typed: dict[CodeDefinition, dict[str, CodeDefinition]] = {}

    @cached_property
    def modules(self) -> Mapping[str, SourceModule]:
        names = [one.name for one in pkgutil.walk_packages(gateway.__path__, "gateway.")]
        return {name: _read(name) for name in names}

    def reached(self, start: CodeDefinition) -> set[CodeDefinition]:
        """Return the functions that a call of `start` may lead to, `start` among them."""
        seen: set[CodeDefinition] = set()
        waiting = [start]
        while waiting:
            thing = waiting.pop()
            if thing not in seen:
                seen.add(thing)
                if thing not in self._called:
                    self._called[thing] = list(self._list_callees(thing))
                waiting.extend(self._called[thing])
        return seen

    def codes(self, start: CodeDefinition) -> set[str]:
        """Return the codes of all refusals that a call of `start` may lead to."""
        return {code for thing in self.reached(start) for code in self.codes_of(thing)}

    def codes_of(self, thing: CodeDefinition) -> frozenset[str]:
        """Return the codes of refusals that a function itself raises; `module.function` for a code that it computes."""
        if thing not in self._named:
            self._named[thing] = frozenset(self._find_codes(thing))
        return self._named[thing]

    def _find_codes(self, thing: CodeDefinition) -> Iterator[str]:
        for node in self._nodes(thing):
            if not isinstance(node, ast.Call):
                continue
            position = _CODE_AT.get(str(self._find_definition(node.func, thing, {})))
            if position is not None and str(thing) not in _MAKERS:
                code = node.args[position]
                yield str(code.value) if isinstance(code, ast.Constant) else str(thing)

    def everything(self) -> Iterator[CodeDefinition]:
        """Yield every function of the gateway's source."""
        for module in self.modules.values():
            yield from (CodeDefinition(module.name, path) for path in module.functions)

    # ── types of expressions ────────────────────────────────────────────────────────────────────────────────

    def _list_callees(self, thing: CodeDefinition) -> Iterator[CodeDefinition]:
        """Yield the functions that a function names or calls: methods of known types, and constructors of classes."""
        types = self._types(thing)
        for node in self._nodes(thing):
            if isinstance(node, ast.Name | ast.Attribute):
                meant = self._find_definition(node, thing, types)
            elif isinstance(node, ast.Subscript):
                meant = self._method(self._type(node.value, thing, types), "__getitem__")
            else:
                continue
            if meant and self._is_class(meant):
                meant = self._method(meant, "__init__")
            if meant and self._is_function(meant):
                yield meant

    def _nodes(self, thing: CodeDefinition) -> Sequence[ast.AST]:
        """Return all nodes of a function's source; to walk through them takes longer than to look at them."""
        if thing not in self._walked:
            self._walked[thing] = [*ast.walk(self.modules[thing.module].functions[thing.path])]
        return self._walked[thing]

    def _types(self, thing: CodeDefinition) -> Mapping[str, CodeDefinition]:
        """Return the classes of a function's variables and parameters, by name, as far as the source declares them."""
        if thing not in self._typed:
            self._typed[thing] = self._find_types(thing)
        return self._typed[thing]

    def _find_types(self, thing: CodeDefinition) -> dict[str, CodeDefinition]:
        types: dict[str, CodeDefinition] = {}
        for node in self._nodes(thing):
            if isinstance(node, ast.arg) and node.annotation is not None:
                kind = self._find_annotated_type(node.annotation, thing)
                if kind:
                    types[node.arg] = kind
        if "." in thing.path:
            types["self"] = CodeDefinition(thing.module, thing.path.partition(".")[0])
        for node in self._nodes(thing):
            for name, value in _assignments(node):
                kind = self._type(value, thing, types)
                if kind:
                    types[name] = kind
        return types

    def _type(
        self, node: ast.expr, thing: CodeDefinition, types: Mapping[str, CodeDefinition]
    ) -> CodeDefinition | None:
        """Return the class of an expression's value; None if the source does not declare it."""
        match node:
            case ast.Await(value=value):
                return self._type(value, thing, types)
            case ast.Name(id=name):
                return types.get(name)
            case ast.Attribute(value=value, attr=name):
                return self._attribute(self._type(value, thing, types), name)
            case ast.Call(func=func):
                meant = self._find_definition(func, thing, types)
                if meant and self._is_class(meant):
                    return meant
                return self._find_return_type(meant)
        return None

    def _find_definition(
        self, node: ast.expr, thing: CodeDefinition, types: Mapping[str, CodeDefinition]
    ) -> CodeDefinition | None:
        """Return the function, class or module that an expression names; None if it is unknown."""
        match node:
            case ast.Name(id=name):
                found = self.modules[thing.module].names.get(name)
                return found and _IMPLEMENTATIONS.get(found, found)
            case ast.Attribute(value=value, attr=name):
                kind = self._type(value, thing, types)
                if kind:
                    return self._method(kind, name)
                outer = self._find_definition(value, thing, types)
                if outer and outer.path == "" and outer.module in self.modules:
                    return self.modules[outer.module].names.get(name)
        return None

    def _attribute(self, kind: CodeDefinition | None, name: str) -> CodeDefinition | None:
        """Return the class of an attribute or property, from the class body or its `__init__`;
        None if it is unknown.
        """
        if kind is None or not self._is_class(kind):
            return None
        for statement in self.modules[kind.module].classes[kind.path].body:
            match statement:
                case ast.AnnAssign(target=ast.Name(id=found), annotation=annotation) if found == name:
                    return self._find_annotated_type(annotation, kind)
        method = self._method(kind, name)
        if method:
            return self._find_return_type(method)
        made = self._method(kind, "__init__")
        if made is None:
            return None
        types = self._types(made)
        for node in self._nodes(made):
            match node:
                case ast.Assign(targets=[ast.Attribute(attr=attribute)], value=value) if attribute == name:
                    return self._type(value, made, types)
        return None

    def _method(self, kind: CodeDefinition | None, name: str) -> CodeDefinition | None:
        if kind is None:
            return None
        method = CodeDefinition(kind.module, f"{kind.path}.{name}")
        return method if self._is_function(method) else None

    def _find_return_type(self, function: CodeDefinition | None) -> CodeDefinition | None:
        if function is None or not self._is_function(function):
            return None
        returns = self.modules[function.module].functions[function.path].returns
        return None if returns is None else self._find_annotated_type(returns, function)

    def _find_annotated_type(self, annotation: ast.expr, thing: CodeDefinition) -> CodeDefinition | None:
        """Return the class that an annotation names, of a union the first; None for other annotations."""
        match annotation:
            case ast.Name(id=name):
                found = self.modules[thing.module].names.get(name)
                return found and _IMPLEMENTATIONS.get(found, found)
            case ast.BinOp(left=left):
                return self._find_annotated_type(left, thing)
        return None

    def _is_function(self, thing: CodeDefinition) -> bool:
        return thing.module in self.modules and thing.path in self.modules[thing.module].functions

    def _is_class(self, thing: CodeDefinition) -> bool:
        return thing.module in self.modules and thing.path in self.modules[thing.module].classes


_REQUEST = CodeDefinition("gateway.http.request", "GatewayRequest")
_IMPLEMENTATIONS = {
    CodeDefinition("gateway.http.wire", "JsonRequest"): _REQUEST,
    CodeDefinition("gateway.executions.request_limits", "RateLimitedRequest"): _REQUEST,
}
"""Classes that are passed where a protocol is named."""
_CODE_AT = {"gateway.http.errors.ApiError": 1, "gateway.http.errors.conflict": 0}
"""Which argument is the code of a refusal."""
_MAKERS = {"gateway.http.errors.conflict"}
"""Functions that take the code as an argument, so that their callers name it."""


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the variables that a statement assigns, each with its value."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            for target, value in zip(targets, values, strict=False):
                if isinstance(target, ast.Name):
                    yield target.id, value


def _read(name: str) -> SourceModule:
    """Return a module of the gateway, parsed: its functions and classes, and the meanings of its names."""
    module = SourceModule(name)
    path = importlib.import_module(name).__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text())
    for node in _statements(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                module.names[alias.asname or alias.name] = _resolve_import(node.module, alias.name)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            module.functions[node.name] = node
            module.names[node.name] = CodeDefinition(name, node.name)
        elif isinstance(node, ast.ClassDef):
            module.classes[node.name] = node
            module.names[node.name] = CodeDefinition(name, node.name)
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    module.functions[f"{node.name}.{inner.name}"] = inner
    return module


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the statements of a module at every depth, outer ones first; nine of ten nodes are expressions instead."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, block, ()))


@cache
def _resolve_import(module: str, name: str) -> CodeDefinition:
    """Return the definition behind `from module import name`: another module, or a definition in the module."""
    try:
        is_module = find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError:
        is_module = False
    return CodeDefinition(f"{module}.{name}") if is_module else CodeDefinition(module, name)
