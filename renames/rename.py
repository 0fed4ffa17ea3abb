#!/usr/bin/env python3
"""Rename modules, names, members and words of the project by a mapping, everywhere at once.

    python rename.py check MAPPING.toml [--concept NAME]   validate keys, report collisions, write nothing
    python rename.py apply MAPPING.toml [--concept NAME]   rename in the working tree (which must be clean)
    python rename.py leftovers MAPPING.toml                list the places that still use an old name

A mapping holds these tables, at its top or below the name of a concept (`[shard.members]`):

    [modules]   "gateway.arrivals.room" = "gateway.ingest.capacity"; a package moves all modules below it that have
                no line of their own. The old root moves too: "execution" = "executor".
    [packages]  "gateway.ingest" = "Docstring of a package that does not exist yet."
    [names]     "gateway.arrivals.room.require" = "require_capacity": class, function or constant of a module.
    [members]   "journal.store.Store.take_back" = "reclaim": method, attribute, field; found by the types of mypy, in
                subclasses and overridden bases too. "module.function.parameter" and "module.Class.method.parameter"
                rename a parameter and its keyword arguments. A bare "lane" renames each identifier of that spelling.
    [parts]     lane = "shard": the part of any identifier (`lane_count`, `LaneQueue`, `BY_LANE`) and of any word in text.
    [words]     "give back" = "release": text in comments, docstrings, other strings, and files that are not Python.

The value is the new name, or a table {to, paths, except, kinds, keep}: `paths` and `except` are globs, `kinds` some of
code, comment, docstring, string, text; `keep` lists identifiers that stay.
Keys are names of before the first mapping: each applied concept is written to renames/NN-concept.toml, and later keys
are translated by these. Edits follow Python's scopes. Where the new name of an import would hide or be hidden, the
import keeps its old local name (`from ingest import capacity as room`), which is reported.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import tokenize
import tomllib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

TABLES = ("modules", "packages", "names", "members", "parts", "words")
KINDS = frozenset({"code", "comment", "docstring", "string", "text"})
APPLIED = Path("renames")
#: Data that tests compare byte by byte, and generated files.
UNTOUCHED = ("*.lock", "tests/payloads/*", "*.db", "*.c", "*.csv", "*.svg", "renames/*", "CHANGELOG.md")
SETTERS = frozenset({"setattr", "delattr", "getattr", "hasattr", "object"})


# --- Mappings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The new name for one old name, and the places where it applies."""

    old: str
    new: str
    paths: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    kinds: frozenset[str] = KINDS
    keep: frozenset[str] = frozenset()

    def covers(self, path: str, kind: str) -> bool:
        return (
            kind in self.kinds
            and (not self.paths or any(fnmatchcase(path, glob) for glob in self.paths))
            and not any(fnmatchcase(path, glob) for glob in self.excluded)
        )


@dataclass
class Mapping:
    """The renames of one concept."""

    modules: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    members: list[Rule] = field(default_factory=list)
    parts: list[Rule] = field(default_factory=list)
    words: list[Rule] = field(default_factory=list)

    def module(self, dotted: str) -> str:
        """Return the new dotted name of a module or package."""
        prefix = dotted
        while prefix:
            if prefix in self.modules:
                return self.modules[prefix] + dotted[len(prefix) :]
            prefix = prefix.rpartition(".")[0]
        return dotted


def read_rule(old: str, value: str | dict[str, Any]) -> Rule:
    if isinstance(value, str):
        return Rule(old, value)
    unknown = value.keys() - {"to", "paths", "except", "kinds", "keep"}
    if unknown:
        raise SystemExit(f"{old}: unknown options {sorted(unknown)}")
    return Rule(
        old,
        value["to"],
        tuple(value.get("paths", ())),
        tuple(value.get("except", ())),
        frozenset(value.get("kinds", KINDS)),
        frozenset(value.get("keep", ())),
    )


def read_concepts(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of each concept of a mapping file, in its order; one without a name is called as the file."""
    content = tomllib.loads(path.read_text())
    unnamed = {key: value for key, value in content.items() if key in TABLES}
    concepts = {key: value for key, value in content.items() if key not in TABLES}
    for name, tables in concepts.items():
        if not isinstance(tables, dict) or tables.keys() - set(TABLES):
            raise SystemExit(f"{path}: [{name}] holds more than {', '.join(TABLES)}")
    return ({path.stem: unnamed} if unnamed else {}) | concepts


def build_mapping(tables: Iterable[dict[str, Any]]) -> Mapping:
    mapping = Mapping()
    for table in tables:
        mapping.modules |= table.get("modules", {})
        mapping.packages |= table.get("packages", {})
        mapping.names |= table.get("names", {})
        for kind in ("members", "parts", "words"):
            getattr(mapping, kind).extend(read_rule(*item) for item in table.get(kind, {}).items())
    return mapping


def translate(key: str, applied: list[Mapping]) -> str:
    """Return what a dotted name is called after the mappings applied so far."""
    for mapping in applied:
        key = translate_once(key, mapping)
    return key


def translate_once(key: str, mapping: Mapping) -> str:
    parts = key.split(".")
    if len(parts) == 1:
        return mapping.module(key)
    for size in range(len(parts) - 1, 0, -1):
        owner, name = ".".join(parts[:size]), parts[size]
        if f"{owner}.{name}" in mapping.names:
            rest = parts[size + 1 :]
            for rule in mapping.members:
                if rest and rule.old == ".".join(parts[: size + 2]):
                    rest[0] = rule.new
            return ".".join([mapping.module(owner), mapping.names[f"{owner}.{name}"], *rest])
    for rule in mapping.members:
        if "." in rule.old and (key == rule.old or key.startswith(rule.old + ".")):
            key = rule.old.rpartition(".")[0] + "." + rule.new + key[len(rule.old) :]
    return mapping.module(key)


# --- Source files and their scopes -----------------------------------------------------------------------------------


@dataclass
class Scope:
    """One Python scope: what each name in it is bound to (the target of an import, or "" for anything else)."""

    kind: str
    parent: Scope | None
    bindings: dict[str, set[str]] = field(default_factory=dict)
    aliased: set[str] = field(default_factory=set)
    shared: dict[str, str] = field(default_factory=dict)  # name -> "global" or "nonlocal"

    def bind(self, name: str, target: str = "", *, aliased: bool = False) -> None:
        scope: Scope = self
        if self.shared.get(name) == "global":
            while scope.parent:
                scope = scope.parent
        elif self.shared.get(name) == "nonlocal" and self.parent:
            found = self.parent.find(name)
            scope = found or self
        scope.bindings.setdefault(name, set()).add(target)
        if aliased:
            scope.aliased.add(name)

    def find(self, name: str) -> Scope | None:
        scope: Scope | None = self
        skipping = False
        while scope:
            if not (skipping and scope.kind == "class") and name in scope.bindings:
                if self.shared.get(name) == "global" and scope.parent:
                    scope = scope.parent
                    continue
                return scope
            skipping = True
            scope = scope.parent
        return None


@dataclass(frozen=True)
class Chain:
    """A name in the code, with the attributes that follow it directly, each with its place in bytes."""

    scope: Scope
    parts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


class SourceFile:
    """One Python file: its text, tree, scopes and each use of a name."""

    def __init__(self, path: str, text: bytes) -> None:
        self.path = path
        self.text = text
        stem = path.removesuffix(".py")
        self.is_package = stem.endswith("__init__")
        self.name = stem.removesuffix("/__init__").replace("/", ".")
        self.tree = ast.parse(text)
        self.lines = line_offsets(text)
        self.scope = Scope("module", None)
        self.scopes: list[Scope] = [self.scope]
        self.chains: list[Chain] = []
        self.imports: list[tuple[Scope, ast.Import | ast.ImportFrom]] = []
        self.patches: list[tuple[Scope, ast.expr, ast.Constant]] = []
        self.pairs: list[tuple[Any, Any]] = []  # texts that follow one another in a call: a module and a name of it
        ScopeBuilder(self).run()

    def offset(self, line: int, column: int) -> int:
        return self.lines[line - 1] + column

    def start(self, node: Any) -> int:
        return self.offset(node.lineno, node.col_offset)

    def end(self, node: Any) -> int:
        return self.offset(node.end_lineno, node.end_col_offset)

    def place(self, offset: int) -> str:
        return f"{self.path}:{bisect_right(self.lines, offset)}"


def line_offsets(text: bytes) -> list[int]:
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    return offsets


class ScopeBuilder(ast.NodeVisitor):
    """Collects the bindings of each scope, and each chain of names with the scope that it is read in."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.scope = file.scope
        self.annotating = False
        self.base: Callable[[Any, bool], int] = lambda node, end: file.end(node) if end else file.start(node)

    def run(self) -> None:
        self.visit(self.file.tree)

    def inside(self, kind: str, visit: Callable[[], None]) -> None:
        outer, self.scope = self.scope, Scope(kind, self.scope)
        self.file.scopes.append(self.scope)
        visit()
        self.scope = outer

    def add(self, name: str, start: int) -> None:
        self.file.chains.append(Chain(self.scope, (name,), ((start, start + len(name.encode())),)))

    def each(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def annotation(self, node: ast.AST | None) -> None:
        if node is not None:
            outer, self.annotating = self.annotating, True
            self.visit(node)
            self.annotating = outer

    def name_at(self, node: ast.AST, pattern: str, name: str) -> int:
        start = self.base(node, False)
        match = re.compile(pattern.encode() + name.encode() + rb"\b").search(self.file.text, start)
        assert match, (self.file.path, name)
        return match.end() - len(name.encode())

    # Definitions

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.scope.bind(node.name)
        self.add(node.name, self.name_at(node, r"\bdef\s+", node.name))
        self.each(node.decorator_list)
        arguments = node.args
        self.each([*arguments.defaults, *arguments.kw_defaults])

        def body() -> None:
            self.each(node.type_params)
            for argument in every_argument(arguments):
                self.annotation(argument.annotation)
            self.annotation(node.returns)
            declare(node.body, self.scope)
            for argument in every_argument(arguments):
                self.scope.bind(argument.arg)
                self.add(argument.arg, self.base(argument, False))
            self.each(node.body)

        # Annotations see the class around them, as its body does; methods' bodies do not.
        outer = self.scope
        for argument in every_argument(arguments):
            self.annotation(argument.annotation) if not node.type_params else None
        self.annotation(node.returns) if not node.type_params else None

        def plain() -> None:
            declare(node.body, self.scope)
            for argument in every_argument(arguments):
                self.scope.bind(argument.arg)
                self.add(argument.arg, self.base(argument, False))
            self.each(node.body)

        self.inside("function", body if node.type_params else plain)
        assert self.scope is outer

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.each([*node.args.defaults, *node.args.kw_defaults])

        def body() -> None:
            for argument in every_argument(node.args):
                self.scope.bind(argument.arg)
                self.add(argument.arg, self.base(argument, False))
            self.visit(node.body)

        self.inside("function", body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.bind(node.name)
        self.add(node.name, self.name_at(node, r"\bclass\s+", node.name))
        self.each(node.decorator_list)

        def body() -> None:
            self.each(node.body)

        def generic() -> None:
            self.each([*node.type_params, *node.bases])
            self.each(keyword.value for keyword in node.keywords)
            self.inside("class", body)

        if node.type_params:
            self.inside("function", generic)
        else:
            generic()

    def comprehension(self, node: Any, *results: ast.expr) -> None:
        self.visit(node.generators[0].iter)

        def body() -> None:
            for index, generator in enumerate(node.generators):
                self.visit(generator.target)
                self.each([*([generator.iter] if index else []), *generator.ifs])
            self.each(results)

        self.inside("comprehension", body)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        self.comprehension(node, node.elt)

    visit_SetComp = visit_ListComp
    visit_GeneratorExp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self.comprehension(node, node.key, node.value)

    def visit_TypeAlias(self, node: ast.TypeAlias) -> None:
        self.visit(node.name)
        if node.type_params:
            self.inside("function", lambda: self.each([*node.type_params, node.value]))
        else:
            self.visit(node.value)

    def visit_TypeVar(self, node: ast.TypeVar) -> None:
        self.scope.bind(node.name)
        self.add(node.name, self.base(node, False))
        self.annotation(node.bound)

    # Bindings

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        outer = self.scope
        while self.scope.kind == "comprehension" and self.scope.parent:
            self.scope = self.scope.parent
        self.visit(node.target)
        self.scope = outer

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        self.annotation(node.annotation)
        if "TypeAlias" in ast.unparse(node.annotation):
            self.annotation(node.value)
        else:
            self.each([node.value])

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.each([node.type])
        if node.name:
            self.scope.bind(node.name)
            after = self.base(node.type, True) if node.type else self.base(node, False)
            match = re.compile(rb"\bas\s+(\w+)").search(self.file.text, after)
            assert match
            self.add(node.name, match.start(1))
        self.each(node.body)

    def visit_MatchAs(self, node: ast.MatchAs) -> None:
        self.each([node.pattern])
        if node.name:
            self.scope.bind(node.name)
            self.add(node.name, self.base(node, True) - len(node.name))

    def visit_MatchStar(self, node: ast.MatchStar) -> None:
        if node.name:
            self.scope.bind(node.name)
            self.add(node.name, self.base(node, True) - len(node.name))

    def visit_Global(self, node: ast.Global | ast.Nonlocal) -> None:
        start = self.base(node, False)
        for name in node.names:
            match = re.compile(rb"\b" + name.encode() + rb"\b").search(self.file.text, start + 6)
            assert match
            self.add(name, match.start())

    visit_Nonlocal = visit_Global

    def visit_Import(self, node: ast.Import) -> None:
        self.file.imports.append((self.scope, node))
        for alias in node.names:
            if alias.asname:
                self.scope.bind(alias.asname, alias.name, aliased=True)
            else:
                root = alias.name.partition(".")[0]
                self.scope.bind(root, root, aliased=True)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.file.imports.append((self.scope, node))
        module = absolute(self.file, node)
        for alias in node.names:
            self.scope.bind(alias.asname or alias.name, f"{module}.{alias.name}", aliased=bool(alias.asname))

    # Uses

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store | ast.Del):
            self.scope.bind(node.id)
        self.add(node.id, self.base(node, False))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names: list[str] = []
        spans: list[tuple[int, int]] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            end = self.base(inner, True)
            names.append(inner.attr)
            spans.append((end - len(inner.attr.encode()), end))
            inner = inner.value
        if isinstance(inner, ast.Name):
            start = self.base(inner, False)
            names.append(inner.id)
            spans.append((start, start + len(inner.id.encode())))
            self.file.chains.append(Chain(self.scope, tuple(reversed(names)), tuple(reversed(spans))))
        else:
            self.visit(inner)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        literal = isinstance(node.value, ast.Name | ast.Attribute) and ast.unparse(node.value).endswith("Literal")
        outer, self.annotating = self.annotating, self.annotating and not literal
        self.visit(node.slice)
        self.annotating = outer

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        match node.args:
            case [ast.Constant(value=str())] | [ast.Constant(value=str()), _] if called == "cast":
                self.visit(node.func)
                self.annotation(node.args[0])
                self.each(node.args[1:])
                return
            case [target, ast.Constant(value=str()) as name, *_] if called in SETTERS:
                self.file.patches.append((self.scope, target, name))
        for module, name in pairwise(node.args):
            if is_text(module) and is_text(name):
                self.file.pairs.append((module, name))
        if called == "TypeVar":
            for keyword in node.keywords:
                self.annotation(keyword.value)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not self.annotating or not isinstance(node.value, str):
            return
        start, end = self.base(node, False), self.base(node, True)
        source = self.file.text[start:end]
        quote = 3 if source[:3] in {b'"""', b"'''"} else 1
        if source[quote:-quote] != node.value.encode() or b"\n" in source:
            return
        try:
            tree = ast.parse(node.value, mode="eval").body
        except SyntaxError:
            return
        outer = self.base
        self.base = lambda inner, at_end: start + quote + (inner.end_col_offset if at_end else inner.col_offset)
        self.visit(tree)
        self.base = outer


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def every_argument(arguments: ast.arguments) -> Iterator[ast.arg]:
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from (argument for argument in (arguments.vararg, arguments.kwarg) if argument)


def declare(body: list[ast.stmt], scope: Scope) -> None:
    """Note the `global` and `nonlocal` names of a function before anything in it is bound."""
    stack: list[ast.AST] = list(body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Global | ast.Nonlocal):
            scope.shared |= dict.fromkeys(node.names, "global" if isinstance(node, ast.Global) else "nonlocal")
        stack.extend(ast.iter_child_nodes(node))


def absolute(file: SourceFile, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = file.name.split(".") if file.is_package else file.name.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


# --- The project -----------------------------------------------------------------------------------------------------


class Project:
    """All files of the working tree, and the meaning of dotted names in them."""

    def __init__(self) -> None:
        listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout.decode()
        self.paths = [path for path in listed.split("\0") if path and Path(path).is_file()]
        python = [path for path in self.paths if path.endswith(".py") and not path.startswith("renames/")]
        self.files = [SourceFile(path, Path(path).read_bytes()) for path in python]
        self.modules = {file.name: file for file in self.files}
        self.packages = {"/".join(path.split("/")[:depth]).replace("/", ".") for path in python for depth in
                         range(1, path.count("/") + 1)}
        self.roots = {name.partition(".")[0] for name in self.modules} - {""}

    def is_module(self, dotted: str) -> bool:
        return dotted in self.modules or dotted in self.packages

    def resolve(self, dotted: str, seen: frozenset[str] = frozenset()) -> tuple[str, str, tuple[str, ...]] | None:
        """Return module, top-level name ("" for the module itself) and the rest; None for what is not ours."""
        parts = dotted.split(".")
        if parts[0] not in self.roots or dotted in seen:
            return None
        size = next((size for size in range(len(parts), 0, -1) if self.is_module(".".join(parts[:size]))), 0)
        if not size:
            return None
        module = ".".join(parts[:size])
        if size == len(parts):
            return module, "", ()
        name, rest = parts[size], tuple(parts[size + 1 :])
        file = self.modules.get(module)
        targets = file.scope.bindings.get(name, set()) if file else set()
        if targets == {f"{module}.{name}"}:
            return None
        if len(targets) == 1 and (target := next(iter(targets))):
            return self.resolve(".".join([target, *rest]), seen | {dotted})
        return (module, name, rest) if targets else None


# --- Renaming of modules and names -----------------------------------------------------------------------------------


@dataclass
class Report:
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Edits:
    """Replacements in one file, by place."""

    def __init__(self) -> None:
        self.spans: dict[tuple[int, int], str] = {}

    def put(self, start: int, end: int, text: str) -> None:
        self.spans[start, end] = text

    def overlaps(self, start: int, end: int) -> bool:
        return any(first < end and start < last for first, last in self.spans)

    def apply(self, text: bytes) -> bytes:
        pieces, at = [], 0
        for (start, end), new in sorted(self.spans.items()):
            if start < at:
                continue  # inside a statement that was written anew
            pieces += [text[at:start], new.encode()]
            at = end
        return b"".join([*pieces, text[at:]])


class Renamer:
    """Finds the edits of modules and top-level names in all files."""

    def __init__(self, project: Project, mapping: Mapping, report: Report) -> None:
        self.project = project
        self.mapping = mapping
        self.report = report
        self.kept: set[tuple[int, str]] = set()  # imports that keep their local name: id of the scope, name
        self.edits: dict[str, Edits] = defaultdict(Edits)
        self.module_spans: dict[str, set[tuple[int, int]]] = defaultdict(set)

    # New names

    def exported(self, module: str, name: str) -> str:
        """Return the new name of a module's top-level name, or of its submodule."""
        file = self.project.modules.get(module)
        if file and name in file.scope.bindings:
            return self.local(file.scope, name, file)
        return self.mapping.module(f"{module}.{name}").rpartition(".")[2]

    def local(self, scope: Scope, name: str, file: SourceFile) -> str:
        return name if (id(scope), name) in self.kept else self.desired(scope, name, file)

    def desired(self, scope: Scope, name: str, file: SourceFile) -> str:
        targets = scope.bindings.get(name, set())
        if "" in targets:
            return self.mapping.names.get(f"{file.name}.{name}", name) if scope is file.scope else name
        if not targets or name in scope.aliased:
            return name
        news = {self.imported(target)[1] for target in targets}
        return news.pop() if len(news) == 1 else name

    def imported(self, target: str) -> tuple[str, str]:
        """Return the new module and the new name of `from module import name`."""
        module, _, name = target.rpartition(".")
        if not module or module.partition(".")[0] not in self.project.roots:
            return module, name
        file = self.project.modules.get(module)
        defined = file is not None and file.scope.bindings.get(name, {target}) != {target}
        if not defined and self.project.is_module(target):
            new_module, _, new_name = self.mapping.module(target).rpartition(".")
            return new_module, new_name
        return self.mapping.module(module), self.exported(module, name)

    # Collisions

    def settle_collisions(self) -> None:
        for _ in range(3):
            before = len(self.kept)
            for file in self.project.files:
                self.settle_file(file)
            if len(self.kept) == before:
                return

    def settle_file(self, file: SourceFile) -> None:
        renamed = {
            (id(scope), name): (scope, name, new)
            for scope in file.scopes
            for name in scope.bindings
            if (new := self.local(scope, name, file)) != name
        }
        if not renamed:
            return
        uses: dict[str, list[tuple[Scope, int]]] = defaultdict(list)
        for chain in file.chains:
            uses[chain.parts[0]].append((chain.scope, chain.spans[0][0]))
        for scope, name, new in renamed.values():
            reason = self.collision(file, scope, name, new, uses)
            if not reason:
                continue
            if "" in scope.bindings[name]:
                error = f"{file.path}: {name} -> {new}: {reason}"
                if error not in self.report.errors:
                    self.report.errors.append(error)
            else:
                self.kept.add((id(scope), name))
                self.report.notes.append(f"{file.path}: import keeps its local name {name} ({new} {reason})")

    def collision(
        self, file: SourceFile, scope: Scope, name: str, new: str, uses: dict[str, list[tuple[Scope, int]]]
    ) -> str:
        for other in scope.bindings:
            if other != name and self.local(scope, other, file) == new:
                if scope.bindings[other] == scope.bindings[name]:
                    continue
                return f"is {other} in the same scope"
        for used, at in uses[name]:
            if used.find(name) is not scope:
                continue
            inner: Scope | None = used
            while inner and inner is not scope:
                if (inner is used or inner.kind != "class") and any(
                    self.local(inner, other, file) == new for other in inner.bindings
                ):
                    return f"is bound between its definition and {file.place(at)}"
                inner = inner.parent
        for used, at in uses[new]:
            owner = used.find(new)
            if owner is scope or not within(used, scope):
                continue
            if owner is None or within(scope, owner):
                return f"means something else in {file.place(at)}"
        return ""

    # Edits

    def run(self) -> None:
        self.settle_collisions()
        for file in self.project.files:
            self.edit_file(file)

    def edit_file(self, file: SourceFile) -> None:
        if file.path.endswith("#script"):
            self.settle_file(file)
        for scope, node in file.imports:
            self.edit_import(file, scope, node)
        for chain in file.chains:
            self.edit_chain(file, chain)
        for scope, target, name in file.patches:
            self.edit_patch(file, scope, target, name)
        for module, name in file.pairs:
            if module.value in self.project.modules and name.value.isidentifier():
                new = self.exported(module.value, name.value)
                if new != name.value:
                    start = file.start(name) + 1
                    self.edits[file.path].put(start, start + len(name.value), new)
        self.edit_all(file)

    def edit_import(self, file: SourceFile, scope: Scope, node: ast.Import | ast.ImportFrom) -> None:
        edits = self.edits[file.path]
        if isinstance(node, ast.Import):
            for alias in node.names:
                new = self.mapping.module(alias.name) if alias.name.partition(".")[0] in self.project.roots else alias.name
                if new != alias.name:
                    start = file.start(alias)
                    edits.put(start, start + len(alias.name), new)
            return
        module = absolute(file, node)
        if module.partition(".")[0] not in self.project.roots or node.names[0].name == "*":
            return
        lines: dict[str, list[str]] = defaultdict(list)
        changed = False
        for alias in node.names:
            new_module, new = self.imported(f"{module}.{alias.name}")
            old_local = alias.asname or alias.name
            new_local = self.local(scope, old_local, file)
            lines[new_module].append(new if new == new_local else f"{new} as {new_local}")
            changed = changed or new_module != module or new != alias.name
        if not changed:
            return
        if len(lines) == 1 and not node.level:
            self.edit_import_in_place(file, scope, node, next(iter(lines)))
            return
        line_end = file.text.find(b"\n", file.end(node))
        silenced = re.search(r"  # noqa.*", file.text[file.end(node) : line_end].decode())
        indent = (silenced[0] if silenced else "") + "\n" + " " * node.col_offset
        text = indent.join(f"from {name} import {', '.join(names)}" for name, names in lines.items())
        if max(map(len, text.split("\n"))) > 110:  # left to the formatter
            text = indent.join(f"from {name} import ({', '.join(names)})" for name, names in lines.items())
        comments = re.findall(rb"#.*", file.text[file.start(node) : file.end(node)])
        if comments:
            self.report.notes.append(f"{file.place(file.start(node))}: comments of an import were lost: {comments}")
        edits.put(file.start(node), file.end(node), text)

    def edit_import_in_place(self, file: SourceFile, scope: Scope, node: ast.ImportFrom, new_module: str) -> None:
        edits, module = self.edits[file.path], node.module or ""
        start = file.text.index(module.encode(), file.start(node) + len("from"))
        if new_module != module:
            edits.put(start, start + len(module), new_module)
        for alias in node.names:
            new = self.imported(f"{module}.{alias.name}")[1]
            local = self.local(scope, alias.asname or alias.name, file)
            text = new if new == local and alias.asname != alias.name else f"{new} as {local}"
            if (new, local) != (alias.name, alias.asname or alias.name) or (alias.asname and new == local != alias.name):
                edits.put(file.start(alias), file.end(alias), text)

    def edit_chain(self, file: SourceFile, chain: Chain) -> None:
        owner = chain.scope.find(chain.parts[0])
        if owner is None:
            return
        edits = self.edits[file.path]
        targets = owner.bindings[chain.parts[0]]
        new_root = self.local(owner, chain.parts[0], file)
        if new_root != chain.parts[0]:
            edits.put(*chain.spans[0], new_root)
        if "" in targets:
            return
        target = sorted(targets)[0]
        if target.partition(".")[0] not in self.project.roots:
            return
        if self.project.is_module(target):
            self.module_spans[file.path].add(chain.spans[0])
        self.edit_attributes(file, target, chain)

    def edit_attributes(self, file: SourceFile, target: str, chain: Chain) -> None:
        edits, at = self.edits[file.path], target
        for index in range(1, len(chain.parts)):
            if not self.project.is_module(at):
                return
            name, module_file = chain.parts[index], self.project.modules.get(at)
            if module_file and name in module_file.scope.bindings:
                new = self.exported(at, name)
                if new != name:
                    edits.put(*chain.spans[index], new)
                found = self.project.resolve(f"{at}.{name}")
                if found is None or found[1]:
                    return
                at = found[0]
                continue
            if not self.project.is_module(f"{at}.{name}"):
                return
            self.module_spans[file.path].add(chain.spans[index])
            at = f"{at}.{name}"
            new_path, old_prefix = self.mapping.module(at), self.mapping.module(at.rpartition(".")[0])
            if new_path.rpartition(".")[0] == old_prefix:
                if new_path.rpartition(".")[2] != name:
                    edits.put(*chain.spans[index], new_path.rpartition(".")[2])
            elif ".".join(chain.parts[: index + 1]) == at:  # from `import a.b.c`
                for span in chain.spans[1 : index + 1]:
                    edits.spans.pop(span, None)
                edits.put(chain.spans[0][0], chain.spans[index][1], new_path)
            else:
                self.report.errors.append(f"{file.place(chain.spans[0][0])}: {'.'.join(chain.parts)} moves out of reach")

    def edit_patch(self, file: SourceFile, scope: Scope, target: ast.expr, name: ast.Constant) -> None:
        found = self.meaning(scope, target)
        if found and not found[1] and found[0] in self.project.modules:
            new = self.exported(found[0], name.value)
            if new != name.value:
                start = file.start(name) + 1
                self.edits[file.path].put(start, start + len(name.value), new)

    def meaning(self, scope: Scope, node: ast.expr) -> tuple[str, str, tuple[str, ...]] | None:
        try:
            parts = ast.unparse(node).split(".")
        except ValueError:
            return None
        owner = scope.find(parts[0])
        if owner is None:
            return None
        target = next(iter(owner.bindings[parts[0]]))
        return self.project.resolve(".".join([target, *parts[1:]])) if target else None

    def edit_all(self, file: SourceFile) -> None:
        for node in file.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=elements) | ast.Tuple(elts=elements)):
                    for element in elements:
                        if isinstance(element, ast.Constant) and (new := self.exported(file.name, element.value)) != element.value:
                            start = file.start(element) + 1
                            self.edits[file.path].put(start, start + len(element.value), new)


def within(scope: Scope, outer: Scope) -> bool:
    at: Scope | None = scope
    while at:
        if at is outer:
            return True
        at = at.parent
    return False


# --- Renaming of members, by the types of mypy -------------------------------------------------------------------------


class MemberRenamer:
    """Finds the edits of methods, attributes, fields and parameters given by their qualified names."""

    def __init__(self, project: Project, rules: list[Rule], edits: dict[str, Edits], report: Report) -> None:
        self.project = project
        self.edits = edits
        self.report = report
        self.new = {rule.old: rule.new for rule in rules if "." in rule.old}
        self.words = {old.rpartition(".")[2] for old in self.new}
        self.found: set[str] = set()

    def run(self) -> None:
        if not self.new:
            return
        mention = re.compile(rb"(?<!\w)(?:" + b"|".join(map(str.encode, sorted(self.words))) + rb")(?!\w)")
        files = [file for file in self.project.files if mention.search(file.text)]
        trees, types = check_types(self.project, files)
        self.follow_protocols(trees)
        for file in files:
            if file.name in trees:
                self.edit_file(file, trees[file.name], types)
        for old in sorted(self.new.keys() - self.found):
            self.report.errors.append(f"[members] {old} was found nowhere")

    def follow_protocols(self, trees: dict[str, Any]) -> None:
        """Rename the members of a protocol in all classes of the project that have each of its members."""
        infos = {info.fullname: info for tree in trees.values() for info in class_infos(tree.names)}
        for old, new in list(self.new.items()):
            owner, _, name = old.rpartition(".")
            protocol = infos.get(owner) or infos.get(owner.rpartition(".")[0])
            if protocol is None or not protocol.is_protocol:
                continue
            rest = old.removeprefix(protocol.fullname)
            for info in infos.values():
                if info is not protocol and all(info.get(member) for member in protocol.protocol_members):
                    for base in info.mro:
                        if rest.split(".")[1] in base.names and base.fullname in infos:
                            self.new.setdefault(base.fullname + rest, new)
                            self.found.add(base.fullname + rest)

    def owned(self, info: Any, name: str) -> str | None:
        """Return the new name of a member of a class, if it or one of its bases has a rule."""
        for base in info.mro:
            old = f"{base.fullname}.{name}"
            if old in self.new:
                self.found.add(old)
                return self.new[old]
        return None

    def owned_by_type(self, type_: Any, name: str) -> str | None:
        from mypy import types as t  # noqa: PLC0415

        type_ = t.get_proper_type(type_)
        match type_:
            case t.Instance():
                if type_.type.fullname == "builtins.type" and type_.args:
                    return self.owned_by_type(type_.args[0], name)
                return self.owned(type_.type, name)
            case t.UnionType():
                return next((new for item in type_.items if (new := self.owned_by_type(item, name))), None)
            case t.TupleType():
                return self.owned_by_type(type_.partial_fallback, name)
            case t.TypeType():
                return self.owned_by_type(type_.item, name)
            case t.TypeVarType():
                return self.owned_by_type(type_.upper_bound, name)
            case t.LiteralType():
                return self.owned_by_type(type_.fallback, name)
            case t.FunctionLike() if type_.is_type_obj():
                return self.owned(type_.type_object(), name)
            case t.TypedDictType():
                return self.owned_by_type(type_.fallback, name)
        return None

    def edit_file(self, file: SourceFile, tree: Any, types: dict[Any, Any]) -> None:
        from mypy import nodes as n  # noqa: PLC0415

        renamer, edits = self, self.edits[file.path]
        text = file.text

        def at(line: int, column: int) -> int:
            """Return the place in bytes of mypy's place, which counts characters of UTF-8 text as ast does."""
            return file.lines[line - 1] + column

        def put_word(start: int, old: str, new: str) -> None:
            match = re.compile(rb"(?<!\w)" + old.encode() + rb"(?!\w)").search(text, start)
            if match:
                edits.put(match.start(), match.end(), new)

        class Visitor(Walker):
            def __init__(self) -> None:
                super().__init__()
                self.classes: list[Any] = []
                self.functions: list[dict[str, str]] = [{}]

            def visit_class_def(self, node: Any) -> None:
                self.classes.append(node.info)
                self.children(node)
                self.classes.pop()

            def visit_func_def(self, node: Any) -> None:
                name = node.name
                if self.classes and node.info is self.classes[-1] and name in renamer.words:
                    if new := renamer.owned(node.info, name):
                        match = re.compile(rb"\bdef\s+" + name.encode() + rb"\b").search(text, at(node.line, 0))
                        if match:
                            edits.put(match.end() - len(name), match.end(), new)
                renamed = {}
                owner = node.fullname
                owners = [owner]
                if node.info and node.info.mro:
                    owners = [f"{base.fullname}.{name}" for base in node.info.mro]
                for argument in node.arguments or []:
                    for one in owners:
                        key = f"{one}.{argument.variable.name}"
                        if key in renamer.new:
                            renamer.found.add(key)
                            renamed[argument.variable.name] = renamer.new[key]
                            put_word(at(argument.line, argument.column), argument.variable.name, renamer.new[key])
                            break
                self.functions.append({**self.functions[-1], **{a.variable.name: "" for a in node.arguments or []}, **renamed})
                self.children(node)
                self.functions.pop()

            def visit_name_expr(self, node: Any) -> None:
                new = ""
                if isinstance(node.node, n.Var) and not node.node.fullname.count(".") or node.kind == n.LDEF:
                    new = self.functions[-1].get(node.name, "")
                if not new and self.classes and isinstance(node.node, n.Var) and node.node.info is self.classes[-1]:
                    new = renamer.owned(node.node.info, node.name) or ""
                if new:
                    start = at(node.line, node.column)
                    if text[start : start + len(node.name)] == node.name.encode():
                        edits.put(start, start + len(node.name), new)
                self.children(node)

            def visit_member_expr(self, node: Any) -> None:
                self.children(node)
                if node.name not in renamer.words:
                    return
                type_ = types.get(node.expr)
                new = renamer.owned_by_type(type_, node.name) if type_ is not None else None
                if new is None and isinstance(node.expr, n.RefExpr) and isinstance(node.expr.node, n.TypeInfo):
                    new = renamer.owned(node.expr.node, node.name)
                if new is None and isinstance(node.expr, n.SuperExpr) and node.expr.info:
                    new = renamer.owned(node.expr.info, node.name)
                if new:
                    end = at(node.end_line, node.end_column)
                    start = end - len(node.name)
                    if text[start:end] == node.name.encode():
                        edits.put(start, end, new)
                    else:
                        renamer.report.errors.append(f"{file.path}:{node.line}: .{node.name} is not where mypy says")

            def visit_super_expr(self, node: Any) -> None:
                self.children(node)
                if node.name in renamer.words and node.info and (new := renamer.owned(node.info, node.name)):
                    end = at(node.end_line, node.end_column)
                    edits.put(end - len(node.name), end, new)

            def visit_call_expr(self, node: Any) -> None:
                self.children(node)
                for name, argument in zip(node.arg_names, node.args, strict=True):
                    if name in renamer.words and (new := self.keyword(node, name)):
                        end = at(argument.line, argument.column)
                        match = re.compile(rb"(?<!\w)" + name.encode() + rb"\s*=\s*[(\s]*$").search(text[:end][-200:])
                        if match:
                            start = max(0, end - 200) + match.start()
                            edits.put(start, start + len(name), new)
                        else:
                            renamer.report.notes.append(f"{file.path}:{node.line}: keyword {name}= not found in the text")

            def keyword(self, node: Any, name: str) -> str | None:
                callee = node.callee
                type_ = types.get(callee)
                from mypy import types as t  # noqa: PLC0415

                proper = t.get_proper_type(type_) if type_ is not None else None
                if isinstance(callee, n.RefExpr) and callee.fullname.endswith((".replace", ".copy.replace")) and node.args:
                    first = types.get(node.args[0])
                    return renamer.owned_by_type(first, name) if first is not None else None
                if isinstance(callee, n.MemberExpr) and callee.name in {"replace", "_replace", "__replace__"}:
                    own = types.get(callee.expr)
                    if own is not None and (new := renamer.owned_by_type(own, name)):
                        return new
                if isinstance(proper, t.FunctionLike) and proper.is_type_obj():
                    info = proper.type_object()
                    for base in info.mro:
                        key = f"{base.fullname}.__init__.{name}"
                        if key in renamer.new:
                            renamer.found.add(key)
                            return renamer.new[key]
                    return renamer.owned(info, name)
                for item in getattr(proper, "items", [proper]):
                    definition = getattr(item, "definition", None)
                    if definition is None:
                        continue
                    fullname = definition.fullname
                    info = getattr(definition, "info", None)
                    names = [f"{base.fullname}.{definition.name}" for base in info.mro] if info and info.mro else [fullname]
                    for one in names:
                        if f"{one}.{name}" in renamer.new:
                            renamer.found.add(f"{one}.{name}")
                            return renamer.new[f"{one}.{name}"]
                return None

            def visit_class_pattern(self, node: Any) -> None:
                self.children(node)
                info = getattr(node.class_ref, "node", None)
                if isinstance(info, n.TypeInfo):
                    for name, value in zip(node.keyword_keys, node.keyword_values, strict=True):
                        if name in renamer.words and (new := renamer.owned(info, name)):
                            end = at(value.line, value.column)
                            match = re.compile(rb"(?<!\w)" + name.encode() + rb"\s*=\s*$").search(text[:end][-200:])
                            if match:
                                start = max(0, end - 200) + match.start()
                                edits.put(start, start + len(name), new)

        Visitor().walk(tree)


def class_infos(symbols: Any) -> Iterator[Any]:
    from mypy.nodes import TypeInfo  # noqa: PLC0415

    for symbol in symbols.values():
        if isinstance(symbol.node, TypeInfo):
            yield symbol.node


class Walker:
    """Visits the nodes of a tree of mypy, whose own visitors are compiled and take no subclasses of ours."""

    REFERENCES = frozenset({"node", "info", "analyzed", "expanded", "original_def", "unanalyzed_items", "defn", "var",
                            "original_decorators", "impl", "method_types", "local_definitions", "imports", "names"})

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def walk(self, node: Any) -> None:
        if id(node) not in self.seen:
            self.seen.add(id(node))
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(node).__name__).lower()
            getattr(self, f"visit_{name}", self.children)(node)

    def children(self, node: Any) -> None:
        for owner in type(node).__mro__:
            for name in getattr(owner, "__mypyc_attrs__", ()):
                if name not in self.REFERENCES:
                    self.each(getattr(node, name, None))

    def each(self, value: Any) -> None:
        from mypy.nodes import Node, SymbolNode, Var  # noqa: PLC0415

        if isinstance(value, list | tuple):
            for item in value:
                self.each(item)
        elif isinstance(value, Node) and not isinstance(value, Var) and (
            not isinstance(value, SymbolNode) or type(value).__name__ in {"FuncDef", "Decorator", "OverloadedFuncDef"}
        ):
            self.walk(value)


def check_types(project: Project, files: list[SourceFile]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Type-check some files afresh, the rest from the cache of `mypy`; return the tree of each module, and all types."""
    from mypy import build  # noqa: PLC0415
    from mypy.main import process_options  # noqa: PLC0415

    sources, chosen = process_options([], stdout=io.StringIO(), stderr=io.StringIO())
    chosen.export_types = True
    chosen.preserve_asts = True
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        if Path(".mypy_cache").is_dir():
            shutil.copytree(".mypy_cache", cache)
            forget_checks(cache, {file.path.removesuffix(".py") for file in files})
        chosen.cache_dir = str(cache)
        result = build.build(sources, chosen)
    if result.errors:
        print("mypy:", *result.errors[:5], sep="\n  ", file=sys.stderr)
    return {name: state.tree for name, state in result.graph.items() if name in project.modules and state.tree}, result.types


def forget_checks(cache: Path, stems: set[str]) -> None:
    for path in cache.glob("*/*.db"):
        with closing(sqlite3.connect(path)) as database, database:
            rows = database.execute("SELECT path FROM files2").fetchall()
            stale = [row for row in rows if row[0].partition(".")[0] in stems]
            database.executemany("DELETE FROM files2 WHERE path = ?", stale)


# --- Renaming of identifiers and words ---------------------------------------------------------------------------------


def case_like(old: str, new: str) -> str:
    """Write a new snake_case word as the old one is written: lane, Lane, LANE."""
    if old.isupper() and len(old) > 1:
        return new.upper()
    if old[:1].isupper():
        return "".join(part[:1].upper() + part[1:] for part in new.split("_"))
    return new


def replace_part(identifier: str, old: str, new: str) -> str:
    """Replace a part of a snake_case, CamelCase or UPPER_CASE identifier."""
    lower, title, upper = old.lower(), case_like(old.capitalize(), old), old.upper()
    identifier = re.sub(rf"(?<![^\W_]){re.escape(lower)}(?![^\W_])", new, identifier)
    identifier = re.sub(rf"(?<![^\W_]){re.escape(upper)}(?![^\W_])", new.upper(), identifier)
    return re.sub(
        rf"(?<![A-Z]){re.escape(title)}(?![a-z])", "".join(p[:1].upper() + p[1:] for p in new.split("_")), identifier
    )


class TextRenamer:
    """Rewrites bare members, parts, words and dotted paths of one text."""

    def __init__(self, project: Project, mapping: Mapping, renamer: Renamer) -> None:
        self.project = project
        self.mapping = mapping
        self.renamer = renamer
        self.bare = [rule for rule in mapping.members if "." not in rule.old]
        roots = "|".join(sorted(map(re.escape, project.roots)))
        self.dotted = re.compile(rf"(?<![\w./-])(?:{roots})(?:[.:]\w+)+")
        self.folders = re.compile(rf"(?<![\w.])(?:{roots})(?:/[\w*]+)+(?:\.(?:py|toml|md|css|svg|json))?/?(?![\w])")
        self.imports = re.compile(rf"\bfrom ((?:{roots})(?:\.\w+)*) import (\w+(?:, \w+)*)")

    def code(self, path: str, identifier: str) -> str:
        for rule in self.bare:
            if rule.old == identifier and rule.covers(path, "code"):
                return rule.new
        for rule in self.mapping.parts:
            if rule.covers(path, "code") and identifier not in rule.keep:
                identifier = replace_part(identifier, rule.old, rule.new)
        return identifier

    def script(self, path: str, literal: str) -> str | None:
        """Rename in a string that is a Python program, which tests hand to other processes; None: it is none."""
        match = re.fullmatch(r"([a-zA-Z]*)(\"\"\"|'''|\"|')(.*)\2", literal, re.DOTALL)
        if not match or "f" in match[1].lower():
            return None
        body = match[3]
        try:
            file = SourceFile(f"{path}#script", body.replace("\\n", " \n").encode())
        except SyntaxError:
            return None
        if not any(isinstance(node, ast.Import | ast.ImportFrom) for _, node in file.imports):
            return None
        self.renamer.edits.pop(file.path, None)
        self.renamer.edit_file(file)
        edits = self.renamer.edits.pop(file.path, Edits())
        if "\n" not in body:
            edits.spans = {span: new.replace("\n", "\\n") for span, new in edits.spans.items()}
        return f"{match[1]}{match[2]}{edits.apply(body.encode()).decode()}{match[2]}"

    def prose(self, path: str, text: str, kind: str, *, has_paths: bool = True) -> str:
        if has_paths:
            text = self.imports.sub(self.import_text, text)
            text = self.dotted.sub(lambda match: self.path_text(match[0]), text)
        text = self.folders.sub(lambda match: self.folder_text(match[0]), text)
        for rule in self.mapping.parts:
            if rule.covers(path, kind):
                text = re.sub(
                    r"\w+",
                    lambda match, rule=rule: match[0] if match[0] in rule.keep else replace_part(match[0], rule.old, rule.new),
                    text,
                )
        for rule in self.mapping.words:
            if rule.covers(path, kind):
                text = replace_word(text, rule)
        return text

    def import_text(self, match: re.Match[str]) -> str:
        lines: dict[str, list[str]] = defaultdict(list)
        for name in match[2].split(", "):
            module, new = self.renamer.imported(f"{match[1]}.{name}")
            lines[module].append(new)
        return "; ".join(f"from {module} import {', '.join(names)}" for module, names in lines.items())

    def path_text(self, text: str) -> str:
        parts = re.split(r"[.:]", text)
        sizes = (size for size in range(len(parts), 0, -1) if self.project.is_module(".".join(parts[:size])))
        size = next(sizes, 0)
        if size < 2:  # noqa: PLR2004 - a word of prose may be a package's name
            return text
        module = ".".join(parts[:size])
        new = self.mapping.module(module)
        rest = text[len(module) :]
        if size < len(parts):
            name = parts[size]
            file = self.project.modules.get(module)
            if file and name in file.scope.bindings:
                rest = rest[0] + self.renamer.exported(module, name) + rest[1 + len(name) :]
                member = self.member(module, parts[size:])
                if member:
                    head = rest[0] + self.renamer.exported(module, name)
                    rest = f"{head}.{member}" + rest[len(head) + 1 + len(parts[size + 1]) :]
        return new + rest

    def member(self, module: str, parts: list[str]) -> str | None:
        if len(parts) < 2:  # noqa: PLR2004
            return None
        found = self.project.resolve(".".join([module, *parts]))
        if not found or not found[2]:
            return None
        old = f"{found[0]}.{found[1]}.{found[2][0]}"
        return next((rule.new for rule in self.mapping.members if rule.old == old), None)

    def folder_text(self, text: str) -> str:
        path = text.rstrip("/*")
        suffix = re.search(r"\.(py|toml|md|css|svg|json)$", path)
        stem = path.removesuffix(suffix[0]) if suffix else path
        dotted, init = re.sub(r"/__init__$", "", stem).replace("/", "."), stem.endswith("/__init__")
        if "." not in dotted:
            return text
        if not self.project.is_module(dotted):
            owner, _, last = dotted.rpartition(".")
            new = self.mapping.module(owner) + "." + last if self.project.is_module(owner) else dotted
        else:
            new = self.mapping.module(dotted)
        if new == dotted:
            return text
        return new.replace(".", "/") + ("/__init__" if init else "") + (suffix[0] if suffix else "") + text[len(path) :]


def replace_word(text: str, rule: Rule) -> str:
    """Replace whole words, in any line break between them, keeping a capital at the beginning."""
    pattern = r"(?<!\w)" + r"(\s+)".join(map(re.escape, rule.old.split())) + r"(?!\w)"
    news = rule.new.split()

    def new(match: re.Match[str]) -> str:
        spaces = list(match.groups())
        words = list(news)
        if match[0][:1].isupper() and not rule.old[:1].isupper():
            words[:1] = [words[0][:1].upper() + words[0][1:]] if words else []
        gaps = [spaces[index] if index < len(spaces) else " " for index in range(len(words) - 1)]
        return "".join(word + gap for word, gap in zip(words, [*gaps, ""], strict=True))

    flags = re.IGNORECASE if rule.old[:1].islower() else 0
    return re.sub(pattern, new, text, flags=flags)


def rewrite_python(path: str, source: bytes, module_names: set[int], texts: TextRenamer, docstrings: set[int]) -> bytes:
    """Rewrite identifiers, comments and strings of Python source. Identifiers that begin at `module_names` stay.

    A new identifier that the file used before is noted: two things may have become one.
    """
    known: dict[str, int] = {}
    made: dict[str, str] = {}
    lines = line_offsets(source)
    decoded = source.decode().splitlines(keepends=True)
    edits = Edits()

    def place(position: tuple[int, int]) -> int:
        line, column = position
        return lines[line - 1] + len(decoded[line - 1][:column].encode()) if line <= len(decoded) else len(source)

    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type in {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}:
            if token.type in {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}:
                statement = []
            continue
        start = place(token.start)
        if token.type == tokenize.NAME:
            statement.append(token)
            importing = statement[0].string == "from" and not any(t.string == "import" for t in statement)
            if not importing and start not in module_names:
                new = texts.code(path, token.string)
                known.setdefault(token.string, token.start[0])
                if new != token.string:
                    made[new] = token.string
                    edits.put(start, place(token.end), new)
        else:
            if token.type == tokenize.COMMENT:
                kind = "comment"
            elif token.type in {tokenize.STRING, tokenize.FSTRING_MIDDLE}:
                kind = "docstring" if start in docstrings else "string"
            else:
                if token.type == tokenize.OP and token.string == ";":
                    statement = []
                continue
            end = place(token.end)
            raw = source[start:end].decode()
            script = texts.script(path, raw) if token.type == tokenize.STRING and "import " in raw else None
            new = texts.prose(path, script or raw, kind, has_paths=script is None)
            if new != raw:
                edits.put(start, end, new)
    for new, old in made.items():
        if new in known:
            texts.renamer.report.notes.append(f"{path}:{known[new]}: {new} was there before {old} became it")
    return edits.apply(source)


def docstring_places(file: SourceFile, tree: ast.Module, lines: list[int]) -> set[int]:
    places = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                places.add(lines[first.lineno - 1] + first.col_offset)
    return places


# --- All together --------------------------------------------------------------------------------------------------------


def check_keys(project: Project, mapping: Mapping, report: Report) -> None:
    for old in mapping.modules:
        if not project.is_module(old):
            report.errors.append(f"[modules] {old}: no such module")
    targets: dict[str, str] = {}
    for name in project.modules:
        new = mapping.module(name)
        if new in targets:
            report.errors.append(f"[modules] {name} and {targets[new]} both become {new}")
        targets[new] = name
    for new in sorted(targets):
        owner = new.rpartition(".")[0]
        known = owner in targets or owner in mapping.packages or owner in project.packages
        if owner and not known:
            report.errors.append(f"[packages] {owner} has no docstring")
    for old in mapping.names:
        module, _, name = old.rpartition(".")
        file = project.modules.get(module)
        if not file or name not in file.scope.bindings:
            report.errors.append(f"[names] {old}: no such name")
        elif "" not in file.scope.bindings[name]:
            report.errors.append(f"[names] {old}: only imported there")
    for rule in mapping.members:
        if "." in rule.old and project.resolve(rule.old.rpartition(".")[0]) is None:
            report.errors.append(f"[members] {rule.old}: no such class or function")


def strip_missing(project: Project, mapping: Mapping) -> None:
    """Forget lines whose old name equals the new one."""
    mapping.modules = {old: new for old, new in mapping.modules.items() if old != new}
    mapping.names = {old: new for old, new in mapping.names.items() if old.rpartition(".")[2] != new}


def translate_mapping(project: Project, mapping: Mapping, applied: list[Mapping]) -> Mapping:
    """Return a mapping with keys as the tree has them now."""

    def exists(key: str) -> bool:
        return project.resolve(key) is not None

    def now(key: str) -> str:
        new = translate(key, applied)
        return key if key != new and exists(key) and not exists(new) else new

    return Mapping(
        {now(old): new for old, new in mapping.modules.items()},
        mapping.packages,
        {now(old): new for old, new in mapping.names.items()},
        [
            Rule(now(rule.old) if "." in rule.old else rule.old, rule.new, rule.paths, rule.excluded, rule.kinds, rule.keep)
            for rule in mapping.members
        ],
        mapping.parts,
        mapping.words,
    )


def rename_all(project: Project, mapping: Mapping, report: Report) -> dict[str, bytes]:
    """Return the new content of each changed file, by its old path."""
    renamer = Renamer(project, mapping, report)
    renamer.run()
    MemberRenamer(project, mapping.members, renamer.edits, report).run()
    texts = TextRenamer(project, mapping, renamer)
    contents: dict[str, bytes] = {}
    for file in project.files:
        new = rename_in_file(file, renamer, texts)
        if new != file.text:
            contents[file.path] = new
    for path in project.paths:
        if path.endswith(".py") or any(fnmatchcase(path, glob) for glob in UNTOUCHED):
            continue
        try:
            old = Path(path).read_bytes().decode()
        except UnicodeDecodeError:
            continue
        new_text = texts.prose(path, old, "text")
        if path == "pyproject.toml":
            for root in {old_name for old_name in mapping.modules if "." not in old_name}:
                new_text = new_text.replace(f'"{root}"', f'"{mapping.modules[root]}"')
        if new_text != old:
            contents[path] = new_text.encode()
    return contents


def rename_in_file(file: SourceFile, renamer: Renamer, texts: TextRenamer) -> bytes:
    edits = renamer.edits[file.path]
    source = edits.apply(file.text)
    if not (texts.bare or texts.mapping.parts or texts.mapping.words or texts.mapping.modules or texts.mapping.names or
            texts.mapping.members):
        return source
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise SystemExit(f"{file.path}: {error}") from error
    modules = set()
    if texts.bare or texts.mapping.parts:
        # Names of modules are renamed by [modules] alone.
        edited = SourceFile(file.path, source)
        renamed_modules = {texts.mapping.module(name) for name in texts.project.modules} | texts.project.packages
        for chain in edited.chains:
            owner = chain.scope.find(chain.parts[0])
            if owner and owner.bindings[chain.parts[0]] & renamed_modules:
                modules.add(chain.spans[0][0])
        for _, node in edited.imports:
            for alias in node.names:
                target = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                if target in renamed_modules:
                    modules.add(edited.start(alias))
                    modules.add(edited.end(alias) - len(alias.asname or alias.name.rpartition(".")[2]))
    return rewrite_python(file.path, source, modules, texts, docstring_places(file, tree, line_offsets(source)))


def new_path(path: str, project: Project, mapping: Mapping) -> str:
    """Return where a file lies afterwards; what lies beside a module with its name, or in its package, goes along."""
    folder, _, file = path.rpartition("/")
    stem, dot, suffix = file.partition(".")
    dotted = f"{folder.replace('/', '.')}.{stem}".strip(".")
    if path.endswith("/__init__.py"):
        return mapping.module(folder.replace("/", ".")).replace(".", "/") + "/__init__.py"
    if dotted in project.modules and not project.modules[dotted].is_package:
        return mapping.module(dotted).replace(".", "/") + dot + suffix
    package = folder.replace("/", ".")
    while package:
        if package in mapping.modules:
            return mapping.modules[package].replace(".", "/") + path[len(package) :]
        package = package.rpartition(".")[0]
    return path


def write(project: Project, mapping: Mapping, contents: dict[str, bytes], report: Report) -> None:
    moves = {path: new for path in project.paths if (new := new_path(path, project, mapping)) != path}
    old_depth = {file.path for file in project.files if b"__file__" in file.text or b"__package__" in file.text}
    moved = {old: (contents.get(old) if old in contents else Path(old).read_bytes()) for old in moves}
    for old in moves:
        Path(old).unlink()
    for path, content in contents.items():
        if path not in moves:
            Path(path).write_bytes(content)
    for old, new in moves.items():
        Path(new).parent.mkdir(parents=True, exist_ok=True)
        Path(new).write_bytes(moved[old] or b"")
        if old in old_depth:
            report.notes.append(f"{new}: uses __file__ or __package__, and was {old}")
    for package, docstring in mapping.packages.items():
        path = Path(package.replace(".", "/")) / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(f'"""{docstring}"""\n')
    remove_empty_packages(moves)


def remove_empty_packages(moves: dict[str, str]) -> None:
    for folder in sorted({Path(old).parent for old in moves}, key=lambda path: -len(path.parts)):
        if folder.is_dir():
            rest = [path for path in folder.iterdir() if path.name != "__pycache__"]
            if [path.name for path in rest] == ["__init__.py"]:
                rest.pop().unlink()
            if not rest:
                subprocess.run(["rm", "-r", str(folder)], check=True)
                if folder.parent.is_dir() and folder.parent != Path():
                    remove_empty_packages({str(folder / "x"): ""})


def list_leftovers(mapping: Mapping) -> Iterator[str]:
    """Yield the places that still speak of an old name: identifiers that nothing defines any longer, old paths."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout.decode().split("\0")
    texts = {}
    for path in listed:
        if path and Path(path).is_file() and not any(fnmatchcase(path, glob) for glob in UNTOUCHED):
            try:
                texts[path] = Path(path).read_text()
            except UnicodeDecodeError:
                continue
    olds = {old: old for old in mapping.modules if "." in old}
    olds |= {old.replace(".", "/"): old for old in mapping.modules if "." in old}
    defined = {
        node.name
        for path, text in texts.items()
        if path.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for old in mapping.names:
        word = old.rpartition(".")[2]
        if word not in defined and ("_" in word or word != word.lower()):
            olds[word] = old
    for rule in (*mapping.parts, *mapping.members):
        word = rule.old.rpartition(".")[2]
        if word not in defined and ("_" in word or rule in mapping.parts):
            olds[word] = rule.old
    for word, old in sorted(olds.items()):
        pattern = re.compile(rf"(?<![\w.]){re.escape(word)}(?!\w)")
        places = [
            f"{path}:{text.count(chr(10), 0, match.start()) + 1}"
            for path, text in texts.items()
            for match in pattern.finditer(text)
        ]
        if places:
            yield f"{word} ({old}): {len(places)}: {' '.join(places[:6])}"


def format_code() -> None:
    for command in (["check", "--fix", "--quiet", "--select", "I"], ["format", "--quiet"]):
        subprocess.run([str(Path(sys.executable).parent / "ruff"), *command], check=False)
    outcome = subprocess.run(
        [str(Path(sys.executable).parent / "ruff"), "check", "--output-format", "concise"], check=False, capture_output=True,
        text=True,
    )
    print(outcome.stdout[-4000:])


def record(concept: str, tables: dict[str, Any]) -> None:
    """Write the applied mapping beside the tool, in its order."""
    APPLIED.mkdir(exist_ok=True)
    number = len(list(APPLIED.glob("*.toml"))) + 1
    lines = []
    for table in TABLES:
        if table in tables:
            lines += [f"[{table}]", *(f"{quote(old)} = {quote_value(new)}" for old, new in tables[table].items()), ""]
    (APPLIED / f"{number:02}-{concept}.toml").write_text("\n".join(lines))


def quote(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def quote_value(value: str | dict[str, Any]) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(quote_value, value)) + "]"
    return "{ " + ", ".join(f"{quote(key)} = {quote_value(item)}" for key, item in value.items()) + " }"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "apply", "leftovers"])
    parser.add_argument("mapping", type=Path)
    parser.add_argument("--concept", action="append", help="one concept of the file, instead of all in it")
    parser.add_argument("--force", action="store_true", help="apply in spite of errors and of a changed tree")
    arguments = parser.parse_args()
    concepts = read_concepts(arguments.mapping)
    chosen = arguments.concept or list(concepts)
    if missing := set(chosen) - concepts.keys():
        raise SystemExit(f"no concept {', '.join(sorted(missing))}; there are {', '.join(concepts)}")
    applied = [build_mapping(read_concepts(path).values()) for path in sorted(APPLIED.glob("*.toml"))]
    original = build_mapping(concepts[name] for name in chosen)
    if arguments.command == "leftovers":
        print(*list_leftovers(original), sep="\n")
        return
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout
    if arguments.command == "apply" and dirty and not arguments.force:
        raise SystemExit("commit what changed first")
    report = Report()
    project = Project()
    mapping = translate_mapping(project, original, applied)
    strip_missing(project, mapping)
    check_keys(project, mapping, report)
    contents = rename_all(project, mapping, report)
    print(*(f"note: {note}" for note in dict.fromkeys(report.notes)), sep="\n")
    print(*(f"ERROR: {error}" for error in report.errors), sep="\n")
    print(f"{len(contents)} files change, {len(report.errors)} errors")
    if arguments.command == "check" or (report.errors and not arguments.force):
        sys.exit(bool(report.errors))
    write(project, mapping, contents, report)
    for name in chosen:
        record(name, concepts[name])
    subprocess.run(["git", "add", "-A"], check=True)
    format_code()
    subprocess.run(["git", "add", "-A"], check=True)
    print("Leftovers:", *list_leftovers(original), sep="\n  ")


if __name__ == "__main__":
    main()
