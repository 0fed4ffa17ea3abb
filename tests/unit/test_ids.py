from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import ids

NUMBERS = st.integers(0, 2**128 - 1)


@pytest.fixture(autouse=True)
def _host_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the time of ids from the host, as a new process does: a gateway of earlier tests has set another clock."""
    monkeypatch.setattr(ids, "_clock", None)
    monkeypatch.setattr(ids, "_last_millisecond", 0)


def id_to_number(new_id: str) -> int:
    """Read an id back into the UUID that it is."""
    number = 0
    for character in new_id.partition("_")[2]:
        number = number << 5 | ids.ALPHABET.index(character)
    return number


@given(NUMBERS, NUMBERS)
def test_ids_sort_as_their_numbers_do(one: int, other: int) -> None:
    assert (ids.encode_base32(one) < ids.encode_base32(other)) == (one < other)
    assert id_to_number(f"wf_{ids.encode_base32(one)}") == one


def test_an_id_is_a_prefix_and_a_uuid_of_version_seven() -> None:
    before, new_id, after = time.time_ns() // 1_000_000, ids.new_id("exec"), time.time_ns() // 1_000_000 + 10
    assert ids.is_id(new_id)
    assert len(new_id) == len("exec_") + 26
    number = id_to_number(new_id)
    assert before <= number >> 80 <= after
    assert (number >> 76 & 0xF, number >> 62 & 0b11) == (7, 0b10)


@given(st.text(), st.text())
def test_an_id_that_is_derived_from_another_is_the_same_each_time_and_lands_near_it(
    one: str, other: str
) -> None:
    origin = ids.new_id("exec")
    derived = ids.derive_id("exec", origin, one, other)
    assert derived == ids.derive_id("exec", origin, one, other)
    assert (derived == ids.derive_id("exec", origin, other, one)) == (one == other)
    assert derived not in {
        ids.derive_id("exec", origin, one + other),
        ids.derive_id("exec", "exec_1", one, other),
    }
    assert derived[:14] == origin[:14]
    number = id_to_number(derived)
    assert number >> 80 == id_to_number(origin) >> 80
    assert (number >> 76 & 0xF, number >> 62 & 0b11) == (7, 0b10)


def test_ids_grow_one_by_one_also_faster_than_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 2_000_000_000_000_000_000)
    made = [ids.new_id("span") for _ in range(10_000)]
    assert made == sorted(set(made))


def test_ids_grow_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ids.new_id("span")
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_000_000_000)
    assert ids.new_id("span") > before


def test_ids_made_by_many_threads_are_all_different() -> None:
    made: list[str] = []

    def make() -> None:
        made.extend([ids.new_id("span") for _ in range(2_000)])
        made.extend(ids.new_ids("span", 3_000))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 4 * 5_000


@pytest.mark.parametrize("count", [0, 1, 1_024, 1_025, 3_000])
def test_several_ids_are_as_many_as_wanted_and_in_order(count: int) -> None:
    made = ids.new_ids("log", count)
    assert len(made) == count
    assert made == sorted(set(made))
    assert all(map(ids.is_id, made))


@pytest.fixture
def organizations() -> Iterator[str]:
    return (ids.new_id("org") for _ in range(2_000))


def test_shards_and_turns_are_spread_and_never_change(organizations: Iterator[str]) -> None:
    names = list(organizations)
    assert len({ids.shard_of(name) for name in names}) > 1_500
    assert len({ids.turn_of_workflow(name) for name in names}) > 800
    assert all(0 <= ids.shard_of(name) < 4_096 and 0 <= ids.turn_of_workflow(name) < 1_024 for name in names)
    # Stored in rows: another result in a newer version would split related rows.
    assert (ids.shard_of("org_1"), ids.turn_of_workflow("wf_1")) == (853, 641)


@pytest.mark.parametrize("text", ["", "a" * 65, "a b", "ä", "a/b", "a\n", "a\0", "a.b"])
def test_a_text_that_cannot_be_an_id_is_recognized(text: str) -> None:
    assert not ids.is_id(text)


@pytest.mark.parametrize("text", ["a", "A-b_9", "x" * 64])
def test_ids_of_clients_are_ids_too(text: str) -> None:
    assert ids.is_id(text)


@given(st.integers(0, 253_402_300_799_000))
def test_an_id_tells_the_millisecond_at_which_it_was_made(milliseconds: int) -> None:
    made = f"exec_{ids.encode_base32(milliseconds << 80 | 0x7 << 76 | 12345)}"
    assert ids.time_of(made) == datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=milliseconds)


@pytest.mark.parametrize(
    "text", ["exec_1", "", "exec_" + "u" * 26, "exec_" + "0" * 27, "exec_" + "0" * 25 + "\n"]
)
def test_a_text_of_another_form_has_no_time(text: str) -> None:
    assert ids.time_of(text) is None
