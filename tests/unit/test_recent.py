import pytest

from concurrency import ttl_cache
from concurrency.ttl_cache import TTLCache


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(ttl_cache, "monotonic", lambda: now[0])
    return now


def test_a_value_is_forgotten_after_its_time(clock: list[float]) -> None:
    memory: TTLCache[str, int] = TTLCache(seconds=5, max_items=10)
    memory.put("a", 1)
    clock[0] += 4.9
    assert memory.get("a") == 1
    clock[0] += 0.1
    assert memory.get("a") is None


def test_a_value_that_is_put_again_lasts_anew(clock: list[float]) -> None:
    memory: TTLCache[str, int] = TTLCache(seconds=5, max_items=10)
    memory.put("a", 1)
    clock[0] += 4
    memory.put("a", 2)
    clock[0] += 4
    assert memory.get("a") == 2


def test_of_too_many_the_oldest_go_first() -> None:
    memory: TTLCache[str, int] = TTLCache(seconds=5, max_items=2)
    for number, key in enumerate(["a", "b", "a", "c"]):
        memory.put(key, number)
    assert [memory.get(key) for key in "abc"] == [2, None, 3]


def test_a_dropped_item_is_gone_and_dropping_it_again_changes_nothing() -> None:
    memory: TTLCache[str, int] = TTLCache(seconds=5, max_items=2)
    memory.put("a", 1)
    memory.drop("a")
    memory.drop("a")
    assert memory.get("a") is None
