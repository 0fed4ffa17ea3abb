"""Differences between JSON values by path."""

from __future__ import annotations

from engine.values import MISSING, Json, PathChange, compare_values


def test_changes_name_their_path() -> None:
    before: Json = {"rows": [{"currency": "EUR", "id": 1}], "a key": 1, "gone": None}
    after: Json = {"rows": [{"currency": None, "id": 1}, {"id": 2}], "a key": 2, "new": [1]}
    found = compare_values(before, after, at_most=10)
    assert found.changes == [
        PathChange("rows[0].currency", "EUR", None),
        PathChange("rows[1]", MISSING, {"id": 2}),
        PathChange('["a key"]', 1, 2),
        PathChange("gone", None, MISSING),
        PathChange("new", MISSING, [1]),
    ]
    assert (found.equal_paths, found.is_cut) == (1, False)


def test_numbers_and_booleans_differ_as_in_json() -> None:
    (change,) = compare_values([1, True, 1.0], [1.0, 1, 1], at_most=10).changes
    assert (change.path, change.before, change.after) == ("[1]", True, 1)


def test_whole_values_of_other_kinds_differ_at_the_root() -> None:
    assert compare_values({"a": 1}, [1], at_most=10).changes == [PathChange("", {"a": 1}, [1])]
    assert compare_values(MISSING, MISSING, at_most=10).changes == []
    assert compare_values(MISSING, 1, at_most=10).changes == [PathChange("", MISSING, 1)]


def test_changes_are_cut_and_nesting_has_no_limit() -> None:
    found = compare_values(list(range(9)), [None] * 9, at_most=3)
    assert (len(found.changes), found.is_cut) == (3, True)
    deep: Json = 1
    other: Json = 2
    for _ in range(2_000):
        deep, other = [deep], [other]
    assert len(compare_values(deep, other, at_most=3).changes) == 1
