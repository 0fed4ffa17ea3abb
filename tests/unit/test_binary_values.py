import struct
import time

import pytest

from nodes.connections.postgresql_binary import (
    LearnedTypes,
    has_plausible_dimensions,
    is_credible,
    iterate_fields,
)

INT4, TEXT, INT4_ARRAY, PAIR, PAIRS, DOMAIN, RANGE, RANGES = (
    23,
    25,
    1007,
    50_000,
    50_001,
    50_002,
    50_003,
    50_004,
)
NEST = 50_005


def type_row(oid: int, kind: bytes = b"b", **known: object) -> dict[str, object]:
    unknown = {"elemtype": None, "attrtypoids": None, "basetype": None, "range_subtype": None}
    return {"oid": oid, "kind": kind, **unknown, **known}


TYPES = LearnedTypes()
TYPES.learn(
    [
        type_row(INT4_ARRAY, elemtype=INT4),
        type_row(PAIR, b"c", attrtypoids=[INT4, INT4_ARRAY]),
        type_row(PAIRS, elemtype=PAIR),
        type_row(DOMAIN, b"d", basetype=PAIRS),
        type_row(RANGE, b"r", range_subtype=PAIR),
        type_row(RANGES, b"m", range_subtype=PAIR),
        type_row(NEST, b"c", attrtypoids=[NEST]),
        type_row(INT4_ARRAY, b"b"),
    ]
)


def encode_item(value: bytes) -> bytes:
    return struct.pack(">i", len(value)) + value


def encode_array(*items: bytes, oid: int = INT4, claimed: int | None = None) -> bytes:
    count = len(items) if claimed is None else claimed
    return struct.pack(">iiIii", 1, 0, oid, count, 1) + b"".join(map(encode_item, items))


def encode_pair(numbers: bytes) -> bytes:
    one = struct.pack(">I", INT4) + encode_item(b"\0\0\0\1")
    return struct.pack(">i", 2) + one + struct.pack(">I", INT4_ARRAY) + encode_item(numbers)


GOOD = encode_array(b"\0\0\0\1", b"\x7f\xff\xff\xff")
BOMB = encode_array(claimed=2**31 - 1)


@pytest.mark.parametrize(
    ("oid", "wrapped"),
    [
        (INT4_ARRAY, lambda numbers: numbers),
        (PAIR, encode_pair),
        (PAIRS, lambda numbers: encode_array(encode_pair(GOOD), encode_pair(numbers), oid=PAIR)),
        (DOMAIN, lambda numbers: encode_array(encode_pair(numbers), oid=PAIR)),
        (RANGE, lambda numbers: b"\x02" + encode_item(encode_pair(GOOD)) + encode_item(encode_pair(numbers))),
        (
            RANGES,
            lambda numbers: (
                struct.pack(">i", 1)
                + encode_item(b"\x02" + encode_item(encode_pair(GOOD)) + encode_item(encode_pair(numbers)))
            ),
        ),
    ],
)
def test_a_count_that_can_not_be_true_is_found_wherever_it_is_hidden(oid: int, wrapped: object) -> None:
    assert callable(wrapped)
    assert is_credible(TYPES, oid, wrapped(GOOD))
    assert not is_credible(TYPES, oid, wrapped(BOMB))


def test_dimensions_and_ranges_are_counted_too() -> None:
    assert has_plausible_dimensions(
        struct.pack(">iiIiiii", 2, 0, INT4, 1, 1, 1, 1) + encode_item(b"\0\0\0\1")
    )
    assert not has_plausible_dimensions(struct.pack(">iiIiiii", 2, 0, INT4, 1, 1, 2**30, 1))
    assert not is_credible(TYPES, RANGES, struct.pack(">i", 2**30))
    assert has_plausible_dimensions(b"a text, however long it may be, is no array of anything")


def test_values_nested_deeper_than_any_are_refused_in_no_time() -> None:
    value = b""
    for _ in range(2_000):
        value = struct.pack(">iI", 1, NEST) + encode_item(value)
    assert not is_credible(TYPES, NEST, value)


def test_a_value_of_too_many_parts_is_not_looked_through() -> None:
    parts = struct.pack(">i", -1) * 1_000_000
    value = struct.pack(">iiIii", 1, 0, PAIR, 1_000_000, 1) + parts
    began = time.process_time()
    assert not is_credible(TYPES, PAIRS, value)
    assert time.process_time() - began < 2
    assert is_credible(TYPES, INT4_ARRAY, struct.pack(">iiIii", 1, 0, INT4, 1_000_000, 1) + parts)


@pytest.mark.parametrize("cut", range(0, len(encode_pair(GOOD)), 3))
def test_truncated_values_are_left_to_the_driver(cut: int) -> None:
    assert is_credible(TYPES, PAIR, encode_pair(GOOD)[:cut]) in {True, False}
    row = struct.pack(">h", 2) + encode_item(b"ab") + encode_item(encode_pair(GOOD)[:cut])
    assert [*iterate_fields(row)][:1] == [b"ab"]
    assert [*iterate_fields(row[:-1])][1:] == []
