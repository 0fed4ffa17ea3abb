"""Pictures of the documentation: each is shown, small, and taken by `make screenshots`."""

from __future__ import annotations

import re
from pathlib import Path

from tests.integration.screenshots import PICTURES

ROOT = Path(__file__).parents[2]
MAX_BYTES = 70_000


def test_every_picture_is_shown_and_small() -> None:
    folder = ROOT / "docs" / "images"
    texts = [path.read_text() for path in (*ROOT.glob("docs/**/*.md"), ROOT / "README.md")]
    shown = {Path(name).name for text in texts for name in re.findall(r"images/(dashboard-[\w.-]+)", text)}
    taken = {f"dashboard-{picture.name}.webp" for picture in PICTURES}
    assert shown == taken == {path.name for path in folder.iterdir()}
    assert all(path.stat().st_size < MAX_BYTES for path in folder.iterdir())
