"""Checks of the project's prose and imports: `python -m tests.source_checks`, part of `make check`.

Docstrings begin with the noun or verb that a reader would search for, and name things instead of paraphrasing them.
No module imports itself through others, not even for its types.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parent.parent

_PRONOUN = r"(?:what|whatever|who|whom|whoever|whomever|whose)"
_LEANING = re.compile(rf"\b{_PRONOUN}\b", re.IGNORECASE)
_OPENING = re.compile(rf"\W*(?:{_PRONOUN}|how|where|that (?:which|what))\b", re.IGNORECASE)

LIMITS: Mapping[str, tuple[int, int]] = {
    "benchmarks": (54, 20),
    "bridge": (34, 12),
    "concurrency": (12, 2),
    "docs": (1, 0),
    "engine": (168, 51),
    "execution": (51, 15),
    "gateway": (580, 161),
    "json_text": (5, 0),
    "mail": (27, 4),
    "messages": (28, 7),
    "nodes": (178, 36),
    "pilotflame": (38, 4),
    "runner": (23, 6),
    "scheduler": (29, 5),
    "senders": (52, 13),
    "tests": (395, 73),
    "workers": (122, 25),
}
"""Docstrings of each package that may still lean on a pronoun, and that may still begin with one. Only lower these."""

KNOWN_CYCLES: Sequence[frozenset[str]] = (
    frozenset(
        {
            "gateway.deployments.activation",
            "gateway.executions.execution_shapes",
            "gateway.executions.large_outputs",
            "gateway.executions.live_events",
            "gateway.executions.rate_limits",
            "gateway.http.endpoint",
            "gateway.http.request",
            "gateway.http.wire",
            "gateway.pods.pod_endpoint",
            "gateway.pods.pod_state",
            "gateway.state",
        }
    ),
    frozenset(
        {
            "gateway.workflows.graph_shapes",
            "gateway.workflows.trigger_rows",
            "gateway.workflows.workflow_rows",
        }
    ),
)
"""Import cycles that still exist, all because of types. Add none."""

Sources: TypeAlias = Mapping[str, ast.Module]
"""Parsed files by their path from the top of the repository."""


@dataclass(frozen=True)
class DocstringFinding:
    """Docstring with a pronoun in place of a noun."""

    path: str
    line: int
    summary: str
    opens: bool
    """Whether the docstring begins with the pronoun."""

    @property
    def package(self) -> str:
        return self.path.split("/")[0]

    def __str__(self) -> str:
        fault = "begins with" if self.opens else "leans on"
        return f"{self.path}:{self.line}: {fault} a pronoun: {self.summary}"


def read_sources() -> Sources:
    """Parse each Python file of the repository that Git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.splitlines()
    return {path: ast.parse((ROOT / path).read_bytes()) for path in sorted(listed) if (ROOT / path).is_file()}


def find_docstrings(sources: Sources) -> Iterator[DocstringFinding]:
    """Yield the docstrings of modules, classes and functions that lean on a pronoun or begin with one."""
    for path, tree in sources.items():
        for node in _statements(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node, clean=False) or ""
            opens = _OPENING.match(text) is not None
            if opens or _LEANING.search(text):
                yield DocstringFinding(path, node.body[0].lineno, text.strip().partition("\n")[0], opens)


def find_excess(findings: Iterable[DocstringFinding], limits: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield a complaint for each package with more findings than its limit, followed by the findings."""
    by_package: dict[str, list[DocstringFinding]] = defaultdict(list)
    for finding in findings:
        by_package[finding.package].append(finding)
    for package, found in sorted(by_package.items()):
        leaning, opening = limits.get(package, (0, 0))
        opens = [finding for finding in found if finding.opens]
        if len(opens) > opening:
            yield f"{package}: {len(opens)} docstrings begin with a pronoun; at most {opening} may"
            yield from map(str, opens)
        if len(found) > leaning:
            yield f"{package}: {len(found)} docstrings lean on a pronoun; at most {leaning} may"
            yield from map(str, found)


def find_cycles(sources: Sources) -> list[list[str]]:
    """Return the groups of modules that import each other, for types or at run time.

    Imports inside functions don't count: they run after both modules exist.
    """
    modules = {_module_name(path): tree for path, tree in sources.items()}
    graph = {name: _imported_modules(tree, modules) - {name} for name, tree in modules.items()}
    return [sorted(group) for group in _strongly_connected(graph) if len(group) > 1]


def find_new_cycles(sources: Sources, known: Iterable[frozenset[str]]) -> Iterator[str]:
    """Yield a complaint for each import cycle that isn't contained in a known one."""
    for group in find_cycles(sources):
        if not any(known_group.issuperset(group) for known_group in known):
            yield f"import cycle: {', '.join(group)}"


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
    complaints = [*find_excess(find_docstrings(sources), LIMITS), *find_new_cycles(sources, KNOWN_CYCLES)]
    if complaints:
        print(*complaints, sep="\n", file=sys.stderr)  # noqa: T201 - its output is its product
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
