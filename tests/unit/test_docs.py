"""Documentation that agrees with the code, and links with existing targets."""

import re
import tomllib
from functools import cache
from pathlib import Path

from docs import settings_reference
from docs.tables import ROOT, build_documents
from doctor.findings import FIXES, DriftClass
from engine.graph import MAX_LOOP_DEPTH
from gateway.http import limits
from nodes import catalog as node_catalog

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_HTML_ANCHOR = re.compile(r'<a (?:id|name)="([^"]+)"')
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CELL_BORDER = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"`[^`\n]+`")
_FILE = re.compile(r"`([\w-]+\.(?:py|md|lock))`")
_STEP = re.compile(r"^\| `([^`]+\.py)` \| `([^`]+)` \|", re.MULTILINE)
PACKAGES = tuple(
    Path(name).name
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
)
_NOT_EXPRESSIONS = {*PACKAGES} - {"concurrency", "execution", "mail", "messages", "nodes", "pilotflame"}
_MODULE = re.compile(rf"`((?:{'|'.join(_NOT_EXPRESSIONS)})(?:\.\w+)+)`")
"""Dotted name of a module. `nodes.fetch` and others may be paths of expressions and settings."""
_PATH = re.compile(rf"`((?:{'|'.join(PACKAGES)}|tests|docs|benchmarks|deploy)(?:/[\w.*<>-]+)+/?)`")


def test_the_generated_tables_and_pages_are_up_to_date() -> None:
    outdated = [str(path) for path, text in build_documents().items() if path.read_text() != text]
    assert not outdated, "run `make docs`"


def test_every_setting_has_a_subject() -> None:
    without = [
        name for name in settings_reference.list_variables() if settings_reference.subject_of(name) is None
    ]
    assert not without, "add these settings to docs/settings_reference.py: SUBJECTS"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 100


def test_the_readme_says_where_and_when_its_figures_were_measured() -> None:
    table = (ROOT / "README.md").read_text().partition("| command |")[2].partition("\n\n")[0]
    header, _, *rows = table.splitlines()
    assert [cell.strip() for cell in header.strip("| ").split("|")][-2:] == ["machine", "date"]
    assert rows
    assert all(re.match(r"\| `.+", row) and re.search(r"\w \| \d{4}-\d\d-\d\d \|$", row) for row in rows)


def test_the_limits_of_the_product_that_advise_against_it_are_those_of_the_code() -> None:
    page = (ROOT / "docs/when-not-to-use.md").read_text()
    assert f"{len(node_catalog.load_catalog().types())} general nodes" in page
    assert f"{limits.NODES:,} nodes per graph" in page
    assert MAX_LOOP_DEPTH == 4
    assert "four levels of nested loops" in page


def test_the_page_of_the_dashboard_names_the_controls_of_the_list_of_runs() -> None:
    template = (ROOT / "gateway/dashboard/templates/run_list.html").read_text()
    chips = template.partition('aria-label="Filter by ')[2].partition('"')[0]
    assert f"buttons filter by {chips};" in (ROOT / "docs/dashboard.md").read_text()


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.findall(
        r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert released[0] == version
    assert f"Version {version}." in (ROOT / "README.md").read_text()


def test_every_relative_link_and_anchor_resolves() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in list_pages()
        for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text())))
        if not re.match(r"[a-z]+:", link) and not is_resolvable(page, link)
    ]
    assert not broken


def test_every_row_of_a_table_has_a_cell_for_each_column() -> None:
    for page in list_pages():
        columns = 0
        for line in _FENCE.sub("", page.read_text()).splitlines():
            cells = len(_CELL_BORDER.findall(line)) if line.startswith("|") else 0
            assert not (cells and columns) or cells == columns, f"{page.relative_to(ROOT)}: {line}"
            columns = cells


def test_every_page_is_reached_from_the_contents() -> None:
    contents = ROOT / "docs/README.md"
    reached, waiting = {contents}, [contents]
    while waiting:
        page = waiting.pop()
        links = (link.partition("#")[0] for link in _LINK.findall(_FENCE.sub("", page.read_text())))
        targets = {
            (page.parent / link).resolve() for link in links if link and not re.match(r"[a-z]+:", link)
        }
        found = {target for target in targets if target.suffix == ".md" and target.exists()} - reached
        reached |= found
        waiting += found
    assert set((ROOT / "docs").glob("**/*.md")) <= reached


def test_every_file_and_module_that_a_page_names_exists() -> None:
    pages = {page: _FENCE.sub("", page.read_text()) for page in list_pages() if page.name != "CHANGELOG.md"}
    missing = [
        f"{page.relative_to(ROOT)}: {name}"
        for page, text in pages.items()
        for name in find_missing_files(text)
    ]
    assert not missing


def test_every_step_of_a_walk_names_a_function_of_its_file() -> None:
    steps = _STEP.findall((ROOT / "docs/architecture.md").read_text())
    assert len(steps) > 30
    missing = [
        f"{file}: {name}"
        for file, name in steps
        if not re.search(rf"^(?:async def|def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert not missing


def test_the_file_check_sees_a_file_that_was_renamed() -> None:
    gone = "`gateway/rooutes.py` `rooutes.py` `gateway/endpoints/` `engine.paths` `docs/x/*.toml`"
    assert find_missing_files(gone) == [
        *("engine.paths", "docs/x/*.toml", "gateway/endpoints/", "gateway/rooutes.py", "rooutes.py")
    ]
    there = "`gateway/routes.py` `routes.py` `gateway/http/` `engine.graph.Graph` `nodes/library/<type>.toml`"
    assert not find_missing_files(there)


def find_missing_files(text: str) -> list[str]:
    """Return the files, folders and modules that a text names as code and that the project does not have.

    A file may be named by the end of its path. `<name>` stands for any name.
    """
    modules = [name for name in _MODULE.findall(text) if not is_module(name)]
    paths = [
        name for name in _PATH.findall(text) if not any(ROOT.glob(re.sub("<[^>]*>", "*", name.rstrip("/"))))
    ]
    files = [name for name in _FILE.findall(text) if name not in list_file_names()]
    return [*modules, *sorted(paths), *files]


def is_module(name: str) -> bool:
    """Tell whether a dotted name is a module, or a name in one."""
    parts = name.split(".")
    return any(
        (ROOT / "/".join(parts[:count])).with_suffix(".py").exists()
        or (ROOT / "/".join(parts[:count])).is_dir()
        for count in {len(parts), max(len(parts) - 1, 2)}
    )


@cache
def list_file_names() -> frozenset[str]:
    """Return the names of all files of the project, and those that users and tools write."""
    folders = (*PACKAGES, "tests", "docs", "benchmarks", "deploy")
    found = {path.name for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return frozenset(found | {path.name for path in ROOT.iterdir()})


def list_pages() -> list[Path]:
    """Return every Markdown page of the project."""
    return [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]


def is_resolvable(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return target.exists() and (not anchor or anchor in list_anchors(target))


@cache
def list_anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page: GitHub's for its headings, and explicit ones."""
    text = _FENCE.sub("", page.read_text())
    found: set[str] = set(_HTML_ANCHOR.findall(text))
    for heading in _HEADING.findall(text):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        unique, number = anchor, 0
        while unique in found:
            number += 1
            unique = f"{anchor}-{number}"
        found.add(unique)
    return frozenset(found)


def test_the_link_check_sees_a_broken_link(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page: `code`, twice\n\n## Twice\n\n## Twice\n\n```sh\n# No heading\n```\n")
    assert is_resolvable(page, "#a-page-code-twice")
    assert is_resolvable(page, "page.md#twice-1")
    assert not is_resolvable(page, "#no-heading")
    assert not is_resolvable(page, "page.md#twice-2")
    assert not is_resolvable(page, "other.md")


def test_the_page_of_the_doctor_has_every_class_with_its_fix() -> None:
    rows = re.findall(
        r"^\| `([a-z-]+)` \| .+ \| (.*?) ?\|$", (ROOT / "docs/doctor.md").read_text(), re.MULTILINE
    )
    described = {drift_class: fix.description for drift_class, fix in FIXES.items()}
    assert dict(rows) == {drift_class.value: described.get(drift_class, "") for drift_class in DriftClass}
