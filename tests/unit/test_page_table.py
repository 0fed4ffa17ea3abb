"""Table of the dashboard's pages, whose modules are loaded with their first request."""

from __future__ import annotations

from pathlib import Path

from gateway.dashboard import page, pages
from gateway.dashboard.routes import PAGES


def test_every_page_has_its_path_and_is_in_the_table() -> None:
    assert {path: page.load_page(name).path for path, name in PAGES.items()} == {path: path for path in PAGES}
    folder = Path(pages.__file__).parent
    defined = {one.stem for one in folder.glob("*.py") if "PAGE: Final = Page(" in one.read_text()}
    assert defined == set(PAGES.values())
