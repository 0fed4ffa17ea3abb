"""Watch cache: choice of the valid one of two states of an object."""

from __future__ import annotations

from typing import Any

from workers.cluster.watch_cache import WatchedCollection


def make_pod(version: int, *, uid: str = "1", workflow_id: str = "wf") -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"pod-{workflow_id}",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {"pilotflame.dev/workflow": workflow_id},
            "annotations": {"pilotflame.dev/workflow-id": workflow_id},
            "managedFields": ["large"],
        },
        "spec": {"nodeName": "node", "containers": ["large"]},
    }


def cached_version(collection: WatchedCollection, workflow_id: str = "wf") -> str | None:
    found = collection.objects_of(workflow_id)
    return found[0]["metadata"]["resourceVersion"] if found else None


def test_events_and_lists_from_before_a_write_of_ours_do_not_undo_it() -> None:
    pods = WatchedCollection("pods")
    assert pods.replace([make_pod(3)], "4") == {"wf"}
    assert pods.put(make_pod(9))
    assert not pods.put(make_pod(5))
    assert pods.replace([make_pod(5)], "6") == set()
    assert cached_version(pods) == "9"


def test_a_new_listing_removes_missing_objects_but_no_newer_ones() -> None:
    pods = WatchedCollection("pods")
    pods.replace([make_pod(3), make_pod(3, uid="2", workflow_id="other")], "4")
    pods.put(make_pod(8, uid="3", workflow_id="new"))
    assert pods.replace([make_pod(3)], "7") == {"other"}
    assert (cached_version(pods), cached_version(pods, "other"), cached_version(pods, "new")) == (
        "3",
        None,
        "8",
    )


def test_an_object_made_anew_under_the_same_name_is_another_one() -> None:
    pods = WatchedCollection("pods")
    pods.put(make_pod(5))
    assert pods.put(make_pod(7, uid="2"))
    assert not pods.remove(make_pod(6)), "the end of the first one is told late"
    assert cached_version(pods) == "7"


def test_versions_that_went_back_with_a_restored_store_are_taken() -> None:
    pods = WatchedCollection("pods")
    pods.replace([make_pod(900)], "1000")
    assert pods.replace([make_pod(20)], "30") == {"wf"}
    assert pods.put(make_pod(31))


def test_large_unread_parts_are_not_kept() -> None:
    pods = WatchedCollection("pods")
    pods.put(make_pod(1))
    (kept,) = pods.objects_of("wf")
    assert kept["spec"] == {"nodeName": "node"}
    assert "managedFields" not in kept["metadata"]
