"""The documentation site is built from every page, with policies that allow no inline code but by hash."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote, urljoin

import pytest

from docs.site import build
from docs.tables import ROOT
from gateway.documentation import site

_REFERENCE = re.compile(r'\b(?:href|src)="([^"]*)"')
_LOADED = re.compile(r'<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)="([^"]*)"')
_ANCHOR = re.compile(r'\bid="([^"]*)"')
needs_site = pytest.mark.skipif(
    not (site.BUILT / site.MANIFEST).exists(), reason="`make docs` builds the site"
)


def test_links_between_staged_pages_resolve(tmp_path: Path) -> None:
    build.stage_pages(tmp_path)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    assert {"index.md", "changelog.md", "benchmarks.md", "senders/sendgrid.md", "decisions.md"} <= pages
    for page in tmp_path.rglob("*.md"):
        for match in build.LINK.finditer(page.read_text()):
            link = match["target"]
            if link and not re.match(r"[a-z]+:|#", link):
                assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_the_navigation_follows_the_sections_of_the_contents() -> None:
    navigation = build.build_navigation(
        "# Docs\n\n## Use\n- [A](a.md#x), [B](b.md)\n- [A](a.md)\n\n## Run\n[C](c/d.md)\n"
    )
    found = re.findall(r":caption: (.+)\n\n((?:.+\n)+)```", navigation)
    assert found == [("Use", "a\nb\n"), ("Run", "c/d\n")]


@pytest.mark.parametrize(
    "page", ['<p style="color: red">', '<button onclick="run()">', "<body ONLOAD=run()>"]
)
def test_a_page_that_needs_unsafe_inline_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="a strict policy forbids"):
        build.build_policy(page)


def test_icons_lose_their_inline_styles() -> None:
    page = build.replace_drawing_styles(
        '<svg width="1" style="display: none; opacity:50%"><line style="opacity: 50%"/>'
    )
    assert page == '<svg width="1" display="none" opacity="50%"><line opacity="50%"/>'


def test_the_viewer_is_locked_by_hash() -> None:
    packages = json.loads((ROOT / "docs/site/package-lock.json").read_text())["packages"]
    assert all(package["integrity"].startswith("sha512-") for name, package in packages.items() if name)
    assert packages["node_modules/swagger-ui-dist"]["license"] == "Apache-2.0"


@needs_site
def test_links_of_the_built_site_resolve() -> None:
    texts = {path.relative_to(site.BUILT).as_posix(): path.read_text() for path in site.BUILT.rglob("*.html")}
    anchors = {name: set(_ANCHOR.findall(text)) for name, text in texts.items()}
    files = {f"/built/{path.relative_to(site.BUILT)}" for path in site.BUILT.rglob("*") if path.is_file()}
    broken = []
    for name, text in texts.items():
        for reference in _REFERENCE.findall(text):
            path, _, anchor = unquote(reference.partition("?")[0]).partition("#")
            if re.match(r"[a-z]+:", reference) or not (path or anchor):
                continue
            # As addresses, not as paths, which would take the file system's word for each of ten thousand references.
            found = urljoin(f"/built/{name}", path)
            found = f"{found}index.html" if found.endswith("/") else found
            is_there = found in files and (not anchor or anchor in anchors[found.removeprefix("/built/")])
            if not (is_there or found in {"/favicon.svg", "/openapi.json"}):
                broken.append(f"{name}: {reference}")
    assert not broken


@needs_site
def test_pages_of_the_built_site_load_nothing_from_another_host() -> None:
    manifest = json.loads((site.BUILT / site.MANIFEST).read_text())
    pages = list(site.BUILT.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        assert not [url for url in _LOADED.findall(page.read_text()) if re.match(r"[a-z]+:|//", url)], page
        policy = manifest[page.relative_to(site.BUILT).as_posix()]["policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy
        assert "http" not in policy


@needs_site
def test_the_built_site_contains_search_and_the_viewer_with_its_license() -> None:
    files = site.open_site(site.BUILT, checkout=ROOT)
    assert isinstance(files, site.DocumentationSite)
    for name in ("search.html", "searchindex.js", "_static/searchtools.js", "changelog.html"):
        assert name in files.files
    for name in ("index.html", "viewer.js", "swagger-ui-bundle.js", "swagger-ui.css", "LICENSE"):
        assert f"api/{name}" in files.files
