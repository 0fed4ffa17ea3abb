"""Size of the product, held to ceilings that only fall: `python -m tests.source_checks --table`, part of `make check`.

A figure above its ceiling in `source_ledger.toml` is a complaint. `--lower` stores figures that have fallen.
"""

from __future__ import annotations

import ast
import io
import tokenize
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

CEILINGS = Path(__file__).with_suffix(".toml")
NOT_PRODUCT = ("tests/", "benchmarks/", "docs/", "deploy/")
_VAGUE = "one found given wanted part place shown left seen known kept held chosen asked rest due line"
VAGUE_LOCALS = frozenset(_VAGUE.split())
"""Names of locals that hide the contents."""
SQL_PACKAGES = ("models/", "journal/")
SQL_STATEMENTS = frozenset({"select", "insert", "update", "delete"})
SQL_LIBRARIES = ("sqlalchemy", "sqlmodel")

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Figures: TypeAlias = dict[str, float]
"""Counts, and shares in percent with one decimal place, by the name of the figure."""

_NO_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


def measure(root: Path, sources: Mapping[str, ast.Module]) -> Figures:
    """Count the files, lines, statements, docstrings, locals, structs and statements of SQL of the product."""
    nodes = {path: [*ast.walk(tree)] for path, tree in sources.items() if not path.startswith(NOT_PRODUCT)}
    every_node = [node for group in nodes.values() for node in group]
    functions = [node for node in every_node if isinstance(node, Function)]
    private = [node for node in functions if node.name.startswith("_") and not node.name.startswith("__")]
    structs = [node.name for node in every_node if isinstance(node, ast.ClassDef) and _is_struct(node)]
    names = Counter(_used_names(every_node))
    calls = Counter(_last_name(node.func) for node in every_node if isinstance(node, ast.Call))
    docstring_lines = {path: _docstring_lines(group) for path, group in nodes.items()}
    docstring_count = sum(len(numbers) for numbers in docstring_lines.values())
    line_count = sum((root / path).read_bytes().count(b"\n") for path in nodes)
    return {
        "folders": len({path.partition("/")[0] for path in sources}),
        "files": len(nodes),
        "SLOC": sum(_count_code_lines(root / path, numbers) for path, numbers in docstring_lines.items()),
        "statements": sum(isinstance(node, ast.stmt) for node in every_node),
        "docstrings, % of lines": _percent(docstring_count, line_count),
        "private functions with a docstring, %": _percent(
            sum(ast.get_docstring(node, clean=False) is not None for node in private), len(private)
        ),
        "private functions used once, % of functions": _percent(
            sum(names[node.name] == 1 for node in private), len(functions)
        ),
        "functions with vague locals, %": _percent(
            sum(not VAGUE_LOCALS.isdisjoint(_stored_names(node)) for node in functions), len(functions)
        ),
        "structs built in one place": sum(calls[name] == 1 for name in structs),
        "modules with SQL outside models and journal": sum(
            any(_imports_statements(node) for node in group)
            for path, group in nodes.items()
            if not path.startswith(SQL_PACKAGES)
        ),
        "modules that name the table Execution": sum(
            "Execution" in _used_names(group) for group in nodes.values()
        ),
        "uses of col": calls["col"],
        "uses of OrderedDict": calls["OrderedDict"],
    }


def read_ceilings() -> Figures:
    """Return the greatest allowed value of each figure."""
    return tomllib.loads(CEILINGS.read_text())


def find_growth(figures: Figures) -> Iterator[str]:
    """Yield a complaint for each figure that is above its ceiling or has none."""
    ceilings = read_ceilings()
    for name, value in figures.items():
        if value > ceilings.get(name, -1):
            yield f"{name}: {value:,} is above the ceiling {ceilings.get(name, 'that is missing')} of {CEILINGS.name}"


def lower_ceilings(figures: Figures) -> None:
    """Store figures that are below their ceilings as the new ceilings."""
    ceilings = read_ceilings()
    rows = (f'"{name}" = {min(value, ceilings.get(name, value))}\n' for name, value in figures.items())
    CEILINGS.write_text("".join(rows))


def render_table(figures: Figures) -> str:
    """Return the figures beside their ceilings, one a line."""
    ceilings = read_ceilings()
    rows = [("figure", "now", "ceiling")]
    rows += [(name, f"{value:,}", f"{ceilings.get(name, 0):,}") for name, value in figures.items()]
    return "\n".join(f"{name:<46}{value:>10}{ceiling:>10}" for name, value, ceiling in rows)


def _percent(count: int, total: int) -> float:
    return round(100 * count / total, 1)


def _docstring_lines(nodes: Iterable[ast.AST]) -> set[int]:
    """Return the lines of texts that stand alone as statements: docstrings, also of constants and fields."""
    numbers: set[int] = set()
    for node in nodes:
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            numbers.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def _count_code_lines(path: Path, docstring_lines: Collection[int]) -> int:
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in _NO_CODE:
            numbers.update(range(token.start[0], token.end[0] + 1))
    return len(numbers.difference(docstring_lines))


def _used_names(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield each name and attribute that is read, as often as it is."""
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield _last_name(node)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _stored_names(function: Function) -> Iterator[str]:
    """Yield the locals and parameters of a function, without those of functions inside it."""
    arguments = function.args
    yield from (argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    nodes: list[ast.AST] = [*function.body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            nodes.extend(ast.iter_child_nodes(node))


def _is_struct(node: ast.ClassDef) -> bool:
    bases = {_last_name(base) for base in node.bases}
    decorators = {
        _last_name(item.func if isinstance(item, ast.Call) else item) for item in node.decorator_list
    }
    return bool(bases & {"Struct", "NamedTuple"} or "dataclass" in decorators)


def _imports_statements(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(SQL_LIBRARIES)
        and not SQL_STATEMENTS.isdisjoint(alias.name for alias in node.names)
    )
