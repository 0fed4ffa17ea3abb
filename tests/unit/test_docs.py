"""The documentation says what the code says."""

import re
from pathlib import Path

from docs.tables import ROOT, documents


def test_the_tables_and_the_reference_of_the_nodes_are_up_to_date() -> None:
    outdated = [str(path) for path, text in documents().items() if path.read_text() != text]
    assert not outdated, "run `make docs`"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / Path(target)).exists(), f"{document.name} links to {target}"
