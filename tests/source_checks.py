"""Checks of the project's prose and imports: `python -m tests.source_checks`, part of `make check`.

Docstrings begin with the noun or verb that a reader would search for, and name things instead of paraphrasing them.
No module imports itself through others, not even for its types.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parent.parent

_PRONOUN = r"(?:what|whatever|who|whom|whoever|whomever|whose)"
_LEANING = re.compile(rf"\b{_PRONOUN}\b", re.IGNORECASE)
_OPENING = re.compile(rf"\W*(?:{_PRONOUN}|how|where|that (?:which|what))\b", re.IGNORECASE)

MAX_LEANING_SHARE = 0.03
"""Greatest share of docstrings that may lean on a pronoun: a relative clause is sometimes the plainest wording."""

Sources: TypeAlias = Mapping[str, ast.Module]
"""Parsed files by their path from the top of the repository."""


@dataclass(frozen=True)
class SourceDocstring:
    """Docstring of a module, class or function, with its first line."""

    path: str
    line: int
    text: str

    @property
    def leans(self) -> bool:
        """Whether it contains a pronoun that stands for a noun."""
        return _LEANING.search(self.text) is not None

    @property
    def opens(self) -> bool:
        """Whether it begins with such a pronoun, or with How or Where."""
        return _OPENING.match(self.text) is not None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text.strip().partition(chr(10))[0]}"


def read_sources() -> Sources:
    """Parse each Python file of the project, without those of hidden folders such as `.venv`."""
    paths = [
        path for folder in ROOT.iterdir() if not folder.name.startswith(".") for path in folder.rglob("*.py")
    ]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_bytes()) for path in sorted(paths)}


def list_docstrings(sources: Sources) -> Iterator[SourceDocstring]:
    """Yield the docstrings of modules, classes and functions."""
    for path, tree in sources.items():
        for node in _statements(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text is not None:
                    yield SourceDocstring(path, node.body[0].lineno, text)


def find_wordy_docstrings(docstrings: Sequence[SourceDocstring]) -> Iterator[str]:
    """Yield a complaint for each docstring that begins with a pronoun, and for too many that lean on one."""
    for docstring in docstrings:
        if docstring.opens:
            yield f"begins with a pronoun: {docstring}"
    leaning = [docstring for docstring in docstrings if docstring.leans]
    if len(leaning) >= max(1, MAX_LEANING_SHARE * len(docstrings)):
        share = f"{len(leaning)} of {len(docstrings)} docstrings"
        yield f"{share} lean on a pronoun; fewer than {MAX_LEANING_SHARE:.0%} may"
        yield from (f"leans on a pronoun: {docstring}" for docstring in leaning)


def find_cycles(sources: Sources) -> list[list[str]]:
    """Return the groups of modules that import each other, for types or at run time.

    Imports inside functions don't count: they run after both modules exist.
    """
    modules = {_module_name(path): tree for path, tree in sources.items()}
    graph = {name: _imported_modules(tree, modules) - {name} for name, tree in modules.items()}
    return [sorted(group) for group in _strongly_connected(graph) if len(group) > 1]


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the module and its statements at every depth; expressions are skipped, which takes half the time."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(_blocks(node))


def _blocks(node: ast.AST) -> Iterator[ast.AST]:
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        children = getattr(node, name, ())
        if isinstance(children, list):
            yield from children


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported_modules(tree: ast.Module, modules: Collection[str]) -> set[str]:
    imported: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                imported.add(submodule if submodule in modules else node.module)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack.extend(_blocks(node))
    return imported.intersection(modules)


def _strongly_connected(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Return the strongly connected components of `graph` (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for successor in graph[node]:
            if successor not in index:
                visit(successor)
                low[node] = min(low[node], low[successor])
            elif successor in stack:
                low[node] = min(low[node], index[successor])
        if low[node] == index[node]:
            position = stack.index(node)
            components.append(stack[position:])
            del stack[position:]

    for node in graph:
        if node not in index:
            visit(node)
    return components


def main() -> int:
    """Print each complaint to standard error; return 1 if there is any."""
    sources = read_sources()
    complaints = [*find_wordy_docstrings([*list_docstrings(sources)])]
    complaints += [f"import cycle: {', '.join(cycle)}" for cycle in find_cycles(sources)]
    if complaints:
        print(*complaints, sep="\n", file=sys.stderr)  # noqa: T201 - its output is its product
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
