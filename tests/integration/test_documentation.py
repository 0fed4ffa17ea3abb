"""The gateway serves the documentation: the built site, or the Markdown pages of a checkout without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs.site import build
from docs.tables import ROOT
from gateway.documentation import plain_pages, site
from tests.integration.gateway_harness import GatewayHarness, assert_refused

PAGE = "<!doctype html><title>Home</title><script>run()</script><style>p {}</style><a href=api/>API</a>"
FILES = {
    "index.html": PAGE,
    "api/index.html": "<title>API</title><script src=viewer.js></script>",
    "api/viewer.js": "show();",
    "_static/basic.css": "p { color: red }",
    "_static/sun.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
    "searchindex.js": "Search.setIndex({})",
    "files/Procfile": "gateway: pilotflame gateway",
}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small site beside a file that it doesn't list."""
    folder = tmp_path / "built"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / site.MANIFEST).write_text(json.dumps(build.build_manifest(folder)))
    (folder / "unlisted.html").write_text("secret")
    (tmp_path / "outside.html").write_text("secret")
    opened = site.open_site(folder, checkout=tmp_path)
    monkeypatch.setattr(site, "_open_built_site", lambda _built_at: opened)
    return folder


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the pages of this checkout as if no site were built."""
    opened = site.open_site(tmp_path, checkout=ROOT)
    monkeypatch.setattr(site, "_open_built_site", lambda _built_at: opened)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("", "text/html; charset=utf-8"),
        ("index.html", "text/html; charset=utf-8"),
        ("api/", "text/html; charset=utf-8"),
        ("api/viewer.js", "text/javascript; charset=utf-8"),
        ("_static/basic.css", "text/css; charset=utf-8"),
        ("_static/sun.svg", "image/svg+xml"),
        ("files/Procfile", "text/plain; charset=utf-8"),
    ],
)
async def test_files_of_the_site_have_types_tags_and_policies(
    harness: GatewayHarness, name: str, content_type: str
) -> None:
    anybody = await harness.client()
    path = f"/docs/{name}"
    first = await anybody.get(path)
    assert (first.status_code, first.headers["Content-Type"]) == (200, content_type)
    assert first.text == FILES[name if name and not name.endswith("/") else f"{name}index.html"]
    assert first.headers["X-Content-Type-Options"] == "nosniff"
    assert first.headers.get_list("Cache-Control") == ["no-cache"]
    assert first.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert "unsafe" not in first.headers["Content-Security-Policy"]
    again = await anybody.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = await anybody.head(path)
    assert (head.status_code, head.headers["ETag"]) == (200, first.headers["ETag"])
    assert_refused(await anybody.post(path), 405, "method-not-allowed")


@pytest.mark.usefixtures("built")
async def test_the_policy_of_a_page_allows_its_inline_code_by_hash(harness: GatewayHarness) -> None:
    answer = await (await harness.client()).get("/docs/")
    policy = answer.headers["Content-Security-Policy"]
    assert f"script-src 'self' {build.hash_source('run()')};" in policy
    assert f"style-src 'self' {build.hash_source('p {}')};" in policy
    assert "connect-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    "name",
    [
        "missing.html",
        "unlisted.html",
        "manifest.json",
        "..%2foutside.html",
        "%2e%2e/outside.html",
        "api/..%2f..%2foutside.html",
        "%2fetc/passwd",
        "..%5coutside.html",
        "index.html%00",
        "index.html/",
        "_static/",
    ],
)
async def test_unlisted_paths_are_not_found(harness: GatewayHarness, name: str) -> None:
    assert_refused(await (await harness.client()).get(f"/docs/{name}"), 404, "not-found")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("path", "location"), [("/", "dashboard"), ("/docs", "docs/"), ("/docs/api", "api/")]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_addresses_without_a_page_lead_to_one(
    harness: GatewayHarness, method: str, path: str, location: str
) -> None:
    answer = await (await harness.client()).request(method, path)
    assert (answer.status_code, answer.headers["Location"], answer.content) == (302, location, b"")


@pytest.mark.usefixtures("plain")
async def test_a_checkout_without_the_site_shows_its_markdown(harness: GatewayHarness) -> None:
    anybody = await harness.client()
    contents = await anybody.get("/docs/")
    assert contents.headers["Content-Type"] == "text/html; charset=utf-8"
    assert contents.headers["Content-Security-Policy"] == plain_pages.POLICY
    assert '<a href="getting-started.md">getting-started.md</a>' in contents.text
    assert '<a href="senders/sendgrid.md">' in contents.text
    assert '<a href="../openapi.json">' in contents.text
    page = await anybody.get("/docs/senders/sendgrid.md")
    assert (page.status_code, page.text.count("<pre>")) == (200, 1)
    assert '<a href="../../openapi.json">' in page.text
    again = await anybody.get("/docs/", headers={"If-None-Match": contents.headers["ETag"]})
    assert again.status_code == 304
    assert "make docs" in (await anybody.get("/docs/api")).text
    for name in ("tables.py", "..%2fREADME.md", "..%2fpyproject.toml", "missing.md"):
        assert_refused(await anybody.get(f"/docs/{name}"), 404, "not-found")


async def test_an_installation_without_documentation_leads_to_the_document_of_the_api(
    harness: GatewayHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/README.md").write_text("Another project installed beside this one.")
    opened = site.open_site(tmp_path / "built", checkout=tmp_path)
    monkeypatch.setattr(site, "_open_built_site", lambda _built_at: opened)
    contents = await (await harness.client()).get("/docs/")
    assert (contents.status_code, "Another project" in contents.text) == (200, False)
    assert '<a href="../openapi.json">' in contents.text


def test_a_plain_page_escapes_its_text(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('<script>x</script> [a](page.md) [b](java"script:x) [c](https://example.com)')
    shown = plain_pages.PlainPages({"page.md": page})
    text = shown.find("page.md").body.decode()  # type: ignore[union-attr]  # a page, which has a body
    assert "<script>" not in text
    assert '<a href="page.md">' in text
    assert text.count("<a ") == 3
