"""Migrations: one chain without a gap, whose end is the revision that the code expects."""

from __future__ import annotations

import re
from pathlib import Path

from models import schema_migration

FOLDER = Path(schema_migration.__file__).parent / "migrations" / "versions"


def test_migrations_are_one_chain_in_the_order_of_their_numbers() -> None:
    found = {}
    for path in sorted(FOLDER.glob("[0-9]*.py")):
        text = path.read_text()
        revision = re.search(r'^revision = "([0-9]+)"$', text, re.MULTILINE)
        earlier = re.search(r'^down_revision = (?:"([0-9]+)"|None)$', text, re.MULTILINE)
        assert revision is not None, path.name
        assert earlier is not None, path.name
        assert path.name.startswith(f"{revision[1]}_"), path.name
        assert revision[1] not in found, f"two migrations have the number {revision[1]}"
        found[revision[1]] = earlier[1]
    numbers = [f"{number:04}" for number in range(1, len(found) + 1)]
    assert list(found) == numbers
    assert list(found.values()) == [None, *numbers[:-1]]
    assert numbers[-1] == schema_migration.HEAD_REVISION
