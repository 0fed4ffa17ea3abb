"""Fields of all types of nodes with values of a hostile author: validation answers in words."""

from __future__ import annotations

import pytest

from tests.hostile_configs import HOSTILE_TEXTS, check_every_field


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_every_field_of_every_type_survives_a_hostile_value(name: str) -> None:
    checked = check_every_field(HOSTILE_TEXTS[name](4_000))
    assert checked.unworded == []
    assert checked.fields > 200
