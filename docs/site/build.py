"""Build the documentation site into the gateway's package: run by `make docs`.

The pages are staged: links to files outside of `docs/` then lead to copies of them. Sphinx builds the HTML in an
environment of its own and fails on any warning, a broken link included. A manifest lists each file with its digest
and, for pages, its Content-Security-Policy.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

from gateway.documentation import site
from tests.tools.environments import ToolEnvironment

SOURCES: Final = Path(__file__).parent
ROOT: Final = SOURCES.parents[1]
TARGET: Final = site.BUILT
ENVIRONMENT: Final = ToolEnvironment("site", SOURCES.parent)
"""Sphinx, its theme, and the viewer of the API, by locks of their own."""

PROJECT_PAGES: Final[Mapping[str, str]] = {
    "docs/README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages whose place on the site differs from their place below `docs/`."""

VIEWER_FILES: Final = (
    "swagger-ui-bundle.js",
    "swagger-ui.css",
    "LICENSE",
    "swagger-ui-bundle.js.LICENSE.txt",
)
OWN_FILES: Final = ("index.html", "viewer.js", "viewer.css")
"""Files of `docs/site/api`: the page around the viewer."""

LINK: Final = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|\]\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL
)
_SECTION: Final = re.compile(r"^## (.+)$", re.MULTILINE)
_OUTSIDE: Final = re.compile(r"[a-z]+:|#")
_DRAWING_STYLE: Final = re.compile(r'(<(?:svg|circle|line|path)\b[^>]*?) style="([^"]*)"')


# ── sources ─────────────────────────────────────────────────────────────────────────────────────────────────


def list_pages() -> dict[Path, str]:
    """Return the path of every Markdown page on the site, by its path in the repository."""
    pages = {
        path: path.relative_to(ROOT / "docs").as_posix()
        for path in sorted((ROOT / "docs").glob("**/*.md"))
        if SOURCES not in path.parents
    }
    return pages | {ROOT / page: place for page, place in PROJECT_PAGES.items()}


def stage_pages(folder: Path) -> None:
    """Write every page into `folder` with links that fit the site, and copy the
    linked files that are no pages beside them.
    """
    pages = list_pages()
    for page, place in pages.items():
        text = LINK.sub(partial(_stage_link, page=page, pages=pages, folder=folder), page.read_text())
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    index = folder / "index.md"
    index.write_text(index.read_text() + build_navigation(index.read_text()))
    with (folder / "decisions.md").open("a") as decisions:
        decisions.write("\n```{toctree}\n:hidden:\n:glob:\n\ndecisions/*\n```\n")


def build_navigation(contents: str) -> str:
    """Return the navigation of the site as text for its first page: a part
    for each section of `contents`, that page.
    """
    _, *parts = _SECTION.split(contents)
    navigation = ""
    for caption, section in zip(parts[::2], parts[1::2], strict=True):
        links = (match["target"] for match in LINK.finditer(section) if match["target"])
        names = dict.fromkeys(
            link.partition("#")[0].removesuffix(".md") for link in links if not _OUTSIDE.match(link)
        )
        navigation += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(names) + "\n```\n"
    return navigation


def _stage_link(match: re.Match[str], page: Path, pages: Mapping[Path, str], folder: Path) -> str:
    """Return a link of `page` as it is on the site, and copy its target into `folder` if that is no page.

    Addresses of other sites, anchors, code and broken links stay as they are.
    """
    link = match["target"]
    if link is None or _OUTSIDE.match(link):
        return match[0]
    name, mark, anchor = link.partition("#")
    target = (page.parent / name).resolve()
    place = pages.get(target)
    if place is None:
        if not target.is_file():
            return match[0]  # Sphinx reports it
        place = f"files/{target.relative_to(ROOT)}"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, folder / place)
    upwards = "../" * pages[page].count("/")
    return f"]({upwards}{place}{mark}{anchor})"


# ── building ────────────────────────────────────────────────────────────────────────────────────────────────


def build_site(target: Path) -> None:
    """Replace `target` with a newly built site. Raises RuntimeError with Sphinx's warnings."""
    with tempfile.TemporaryDirectory() as scratch:
        staged, built = Path(scratch, "pages"), Path(scratch, "site")
        stage_pages(staged)
        _run_sphinx(staged, built)
        shutil.rmtree(built / ".doctrees")
        for leftover in (built / ".buildinfo", built / "objects.inv", *built.rglob("*.map")):
            leftover.unlink()
        for page in built.rglob("*.html"):
            page.write_text(replace_drawing_styles(page.read_text()))
        _add_viewer(built / "api")
        manifest = build_manifest(built)
        (built / site.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(built, target)


def _run_sphinx(pages: Path, target: Path) -> None:
    """Build the HTML of the staged pages into `target`; raises RuntimeError with Sphinx's warnings."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    command = [
        *(str(ENVIRONMENT.python), "-m", "sphinx", "--quiet", "--fail-on-warning", "--builder", "html"),
        *("--conf-dir", str(SOURCES), "--define", f"release={version}"),
        *("--define", f"html_title=Pilotflame {version}", str(pages), str(target)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        raise RuntimeError(f"Sphinx failed:\n{done.stdout}{done.stderr}".replace(f"{pages}/", ""))


def _add_viewer(target: Path) -> None:
    """Copy the viewer of the API, and the page around it, into a new folder."""
    target.mkdir()
    package = ENVIRONMENT.folder / "node_modules/swagger-ui-dist"
    for folder, names in ((package, VIEWER_FILES), (SOURCES / "api", OWN_FILES)):
        for name in names:
            shutil.copy(folder / name, target / name)


# ── policies ────────────────────────────────────────────────────────────────────────────────────────────────


def build_manifest(folder: Path) -> dict[str, dict[str, str]]:
    """Return the digest and, for pages, the Content-Security-Policy of each file, by its path."""
    manifest = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        entry = {"digest": sha256(path.read_bytes()).hexdigest()[:32]}
        if path.suffix == ".html":
            entry["policy"] = build_policy(path.read_text())
        manifest[path.relative_to(folder).as_posix()] = entry
    return manifest


def build_policy(page: str) -> str:
    """Return the Content-Security-Policy of a page: files of its server, and its inline scripts and styles by hash.

    Raises ValueError for a page that needs more: event handlers and styles in attributes.
    """
    found = InlineCode()
    found.feed(page)
    found.close()
    if found.refused:
        raise ValueError(f"a strict policy forbids {', '.join(sorted(found.refused))}")
    return "; ".join(
        [
            "default-src 'none'",
            " ".join(["script-src 'self'", *sorted(set(map(hash_source, found.scripts)))]),
            " ".join(["style-src 'self'", *sorted(set(map(hash_source, found.styles)))]),
            "img-src 'self' data:",
            "font-src 'self'",
            "connect-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        ]
    )


def replace_drawing_styles(page: str) -> str:
    """Return a page with inline styles of its icons replaced by SVG attributes: a strict policy forbids the styles."""
    return _DRAWING_STYLE.sub(
        lambda match: (
            match[1]
            + "".join(
                f' {name.strip()}="{value.strip()}"'
                for name, _, value in (rule.partition(":") for rule in match[2].split(";") if rule.strip())
            )
        ),
        page,
    )


def hash_source(code: str) -> str:
    """Return the source expression that allows an inline script or style."""
    return f"'sha256-{base64.b64encode(sha256(code.encode()).digest()).decode()}'"


class InlineCode(HTMLParser):
    """Parser that collects the inline scripts and styles of a page, and the
    attributes that only `unsafe-inline` would allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.refused: set[str] = set()
        self._texts: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        self.refused |= {f"{tag} {name}" for name in names if name == "style" or name.startswith("on")}
        if tag == "style":
            self._texts = self.styles
        elif tag == "script" and "src" not in names:
            self._texts = self.scripts

    def handle_data(self, data: str) -> None:
        if self._texts is not None:
            self._texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style"}:
            self._texts = None


if __name__ == "__main__":
    build_site(TARGET)
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    sys.stdout.write(f"{TARGET.relative_to(ROOT)}: {size / 1e6:.1f} MB\n")
