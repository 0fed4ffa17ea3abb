"""Differences between two graphs: by ids, field by field, with JSON equality."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from gateway.workflows import graph_difference

A = {"id": "a", "type": "manual", "label": "A", "position": {"x": 1, "y": 2}, "config": {}}
B = {"id": "b", "type": "set", "label": "B", "position": {"x": 3, "y": 4}, "config": {"values": {"n": 1}}}


def item_differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - JSON
    """Return a difference as clients see it."""
    return msgspec.to_builtins(graph_difference.compare_items(before, after))


def field_differences(before: dict[str, Any], after: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    return msgspec.to_builtins(graph_difference.compare_fields(before, after))


def test_equal_graphs_do_not_differ_in_any_order() -> None:
    assert item_differences([A, B], [B, A]) == {"added": [], "removed": [], "changed": []}


def test_added_and_removed_parts_are_shown_whole() -> None:
    assert item_differences([A], [B]) == {"added": [B], "removed": [A], "changed": []}


def test_a_change_names_its_fields_with_the_values_before_and_after() -> None:
    after = B | {"label": "New", "config": {"values": {"n": 2}}}
    assert item_differences([A, B], [A, after])["changed"] == [
        {
            "id": "b",
            "changes": {
                "label": {"before": "B", "after": "New"},
                "config": {"before": {"values": {"n": 1}}, "after": {"values": {"n": 2}}},
            },
        }
    ]


def test_a_moved_node_is_listed_apart_from_changed_ones() -> None:
    place = {"x": 30, "y": 40}
    moved = {"before": B["position"], "after": place}
    assert item_differences([B], [B | {"position": place}])["changed"] == [
        {"id": "b", "changes": {}, "position": moved}
    ]
    both = item_differences([B], [B | {"position": place, "label": "New"}])["changed"][0]
    assert both["position"] == moved
    assert set(both["changes"]) == {"label"}


def test_a_field_that_came_or_went_has_one_side_and_null_is_a_value() -> None:
    assert field_differences({"a": 1, "b": None}, {"b": 0, "c": None}) == {
        "a": {"before": 1},
        "b": {"before": None, "after": 0},
        "c": {"after": None},
    }


def test_values_are_compared_as_json_compares_them() -> None:
    assert field_differences({"a": 1, "b": [0]}, {"a": True, "b": [False]}) == {
        "a": {"before": 1, "after": True},
        "b": {"before": [0], "after": [False]},
    }
    assert field_differences({"a": 1, "b": {"x": 1, "y": 2}}, {"a": 1.0, "b": {"y": 2, "x": 1}}) == {}


def test_nodes_of_a_draft_that_share_an_id_are_compared_in_their_order() -> None:
    twin = A | {"label": "Twin"}
    assert item_differences([A, twin], [A, twin | {"label": "New"}])["changed"] == [
        {"id": "a", "changes": {"label": {"before": "Twin", "after": "New"}}}
    ]
    assert item_differences([A], [A, twin]) == {"added": [twin], "removed": [], "changed": []}


graphs = st.lists(
    st.fixed_dictionaries({"id": st.sampled_from("abc"), "label": st.sampled_from(["x", 1, True, None])}),
    max_size=6,
)


@given(before=graphs, after=graphs)
def test_back_is_the_mirror_of_there(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    there, back = item_differences(before, after), item_differences(after, before)
    assert (there["added"], there["removed"]) == (back["removed"], back["added"])
    assert len(before) - len(there["removed"]) + len(there["added"]) == len(after)
    turned = sorted(
        (item["id"], str(item["changes"]["label"]["after"]), str(item["changes"]["label"]["before"]))
        for item in back["changed"]
    )
    assert turned == sorted(
        (item["id"], str(item["changes"]["label"]["before"]), str(item["changes"]["label"]["after"]))
        for item in there["changed"]
    )
