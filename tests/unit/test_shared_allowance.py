"""Places that the clients of a gateway share."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from gateway.http.errors import ApiError
from gateway.http.shared_allowance import SharedAllowance, SharedPlace

LIMIT = 12
CLIENTS = [(organization, f"{organization}-{number}") for organization in "abcd" for number in range(3)]


@given(
    st.sampled_from(CLIENTS),
    st.lists(st.tuples(st.sampled_from(CLIENTS), st.booleans()), min_size=10, max_size=120),
)
def test_a_client_at_its_most_never_takes_the_first_place_of_another(
    greedy: tuple[str, str], steps: list[tuple[tuple[str, str], bool]]
) -> None:
    allowance = SharedAllowance(LIMIT, "full")
    places: dict[SharedPlace, None] = {}
    held: Counter[tuple[str, str]] = Counter()

    def take(client: tuple[str, str]) -> None:
        def evict() -> None:
            del places[place]
            held[client] -= 1

        place = allowance.take(*client, evict)
        places[place] = None
        held[client] += 1

    for _ in range(LIMIT):
        take(greedy)
    assert held[greedy] == LIMIT, "a client alone takes all"
    for client, releases in steps:
        before = held.copy()
        if releases and held[client]:
            place = next(one for one in places if (one.organization_id, one.key_id) == client)
            del places[place]
            held[client] -= 1
            place.release()
            place.release()
        else:
            is_full = allowance.taken == LIMIT
            with suppress(ApiError):
                take(client)
            assert is_full or held[client] == before[client] + 1, "a place was free"
            # Four organizations of three keys each have a share of one place for every key.
            assert held[client] >= 1, "the first place of a client is its own"
            lost = [one for one in CLIENTS if held[one] < before[one]]
            assert all(held[one] >= 1 for one in lost if one != client), "nobody loses its last place"
        assert allowance.taken == sum(held.values()) <= LIMIT
    assert len(places) == allowance.taken


def test_a_client_alone_takes_all_and_a_larger_one_gives_until_both_are_equal() -> None:
    allowance = SharedAllowance(4, "full")
    ended: list[int] = []
    for number in range(4):
        allowance.take("a", "a-1", lambda number=number: ended.append(number))  # type: ignore[misc]
    for key_id in ("b-1", "b-1", "b-2", "b-1", "b-2"):
        with suppress(ApiError):
            allowance.take("b", key_id, lambda: ended.append(9))
    assert ended == [0, 1, 9], "the oldest of the other organization first, then one of the larger key"
