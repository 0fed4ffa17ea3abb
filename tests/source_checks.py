"""Checks of the project's prose, names and imports: `python -m tests.source_checks`, part of `make check`.

Docstrings begin with the noun or verb that a reader would search for, and name things instead of paraphrasing them.
Each type has a name of its own, and the product itself uses each of its functions and types. No module imports itself
through others, not even for its types. In the gateway, only handlers and the modules around them get a whole request or
the state of the process; functions below them get what they need.
"""

from __future__ import annotations

import ast
import gc
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tests import source_ledger

ROOT = Path(__file__).parent.parent

_PRONOUN = r"(?:what|whatever|who|whom|whoever|whomever|whose)"
_LEANING = re.compile(rf"\b{_PRONOUN}\b", re.IGNORECASE)
_OPENING = re.compile(rf"\W*(?:{_PRONOUN}|how|where|that (?:which|what))\b", re.IGNORECASE)

WHOLE_TYPES = frozenset({"GatewayRequest", "GatewayState"})
WHOLE_TYPE_MODULES = (
    "gateway.http.",
    "gateway.main",
    "gateway.state",
    "gateway.pods.pod_endpoint",
    "gateway.dashboard.page",
)
"""Endpoints, which make requests for handlers, and the modules that build the state."""

MAX_LEANING_SHARE = 0.03
"""Greatest share of docstrings that may lean on a pronoun: a relative clause is sometimes the plainest wording."""

CLIENT_FOLDER = "sdk/"
OUTSIDE_PRODUCT = ("tests/", "benchmarks/", "deploy/", "docs/")
"""Folders whose use of a function doesn't keep it in the product, and whose tools call their functions by name."""

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
        """Whether the text contains a pronoun that stands for a noun."""
        return _LEANING.search(self.text) is not None

    @property
    def opens(self) -> bool:
        """Whether the text begins with such a pronoun, or with How or Where."""
        return _OPENING.match(self.text) is not None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text.strip().partition(chr(10))[0]}"


def read_sources() -> Sources:
    """Return each Python file of the project, parsed, by its path; hidden folders such as `.venv` are left out."""
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
    """Yield a complaint for each docstring that begins with a pronoun,
    and all that contain one if those are too many.
    """
    for docstring in docstrings:
        if docstring.opens:
            yield f"begins with a pronoun: {docstring}"
    leaning = [docstring for docstring in docstrings if docstring.leans]
    if len(leaning) >= max(1, MAX_LEANING_SHARE * len(docstrings)):
        share = f"{len(leaning)} of {len(docstrings)} docstrings"
        yield f"{share} lean on a pronoun; fewer than {MAX_LEANING_SHARE:.0%} may"
        yield from (f"leans on a pronoun: {docstring}" for docstring in leaning)


def find_cycles(sources: Sources) -> list[list[str]]:
    """Return the groups of modules that import each other, for types, at the start or inside functions."""
    modules = {_module_name(path): tree for path, tree in sources.items()}
    graph = {name: _imported_modules(tree, modules) - {name} for name, tree in modules.items()}
    return [sorted(group) for group in _strongly_connected(graph) if len(group) > 1]


def find_shared_type_names(sources: Sources) -> Iterator[str]:
    """Yield a complaint for each name that two classes share, so that a search for a type finds one.

    The client has the types of the API under the names of the server.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in sources.items():
        if not path.startswith(CLIENT_FOLDER):
            for node in _statements(tree):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{path}:{node.lineno}")
    for name, shared in places.items():
        if len(shared) > 1:
            yield f"several types are named {name}: {', '.join(shared)}"


def find_unused(sources: Sources, texts: Mapping[str, str]) -> Iterator[str]:
    """Yield a complaint for each function and class of a module of the product whose name is nowhere else in it.

    `texts` are the files of `sources`. Decorated functions are used by their decorators.
    """
    product = {path: tree for path, tree in sources.items() if not path.startswith(OUTSIDE_PRODUCT)}
    mentions = Counter(word for path in product for word in re.findall(r"\w+", texts[path]))
    for path, tree in product.items():
        for node in tree.body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not node.decorator_list
                and mentions[node.name] == 1
            ):
                yield f"nothing uses {node.name}: {path}:{node.lineno}"


def find_whole_parameters(sources: Sources) -> Iterator[str]:
    """Yield a complaint for each use of a whole request or state in a module of the gateway without handlers.

    A use is a parameter of a function or a field of a class. Handlers are named in the route tables. Records
    with such a field are complaints in every module.
    """
    gateway = {_module_name(path): tree for path, tree in sources.items() if path.startswith("gateway/")}
    with_handlers = _find_handler_modules(gateway)
    for name, tree in gateway.items():
        if name.startswith(WHOLE_TYPE_MODULES):
            continue
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name not in with_handlers:
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                annotated = [(argument.arg, argument.annotation) for argument in arguments]
            elif isinstance(node, ast.ClassDef):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                annotated = [(ast.unparse(field.target), field.annotation) for field in fields]
            else:
                continue
            for label, annotation in annotated:
                if annotation is not None and WHOLE_TYPES & set(_names(annotation)):
                    yield f"takes {ast.unparse(annotation)}: {label} of {node.name} in {name}, line {node.lineno}"


def _find_handler_modules(modules: Sources) -> set[str]:
    """Return the names of modules with a function that a route table names."""
    found: set[str] = set()
    for name, table in modules.items():
        if name.endswith(".routes"):
            used = {
                (node.value.id, node.attr)
                for node in ast.walk(table)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            }
            for module in _imported_modules(table, modules):
                functions = [
                    node.name for node in modules[module].body if isinstance(node, ast.AsyncFunctionDef)
                ]
                if any((module.rpartition(".")[2], function) in used for function in functions):
                    found.add(module)
    return found


def _names(annotation: ast.expr) -> Iterator[str]:
    """Yield the names in an annotation, which may be quoted."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value)


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
    """Return the modules of the project that a file imports, at its top or in functions, also for types alone."""
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
        else:
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


def main(options: Collection[str]) -> int:
    """Print each complaint to standard error; return 1 if there is any. With `--table`, print the ledger instead."""
    gc.disable()  # millions of nodes that all stay would be searched again and again, for most of the time
    sources = read_sources()
    figures = source_ledger.measure(ROOT, sources)
    if "--lower" in options:
        source_ledger.lower_ceilings(figures)
    if "--table" in options:
        print(source_ledger.render_table(figures))  # noqa: T201 - its output is its product
        return 0
    complaints = [*find_wordy_docstrings([*list_docstrings(sources)])]
    complaints += find_shared_type_names(sources)
    complaints += find_unused(sources, {path: (ROOT / path).read_text() for path in sources})
    complaints += find_whole_parameters(sources)
    complaints += [f"import cycle: {', '.join(cycle)}" for cycle in find_cycles(sources)]
    complaints += source_ledger.find_growth(figures)
    if complaints:
        print(*complaints, sep="\n", file=sys.stderr)  # noqa: T201 - its output is its product
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
