"""JSON texts that cost the most to decode, to write or to compare, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Final, TypeAlias

Text: TypeAlias = Callable[[int], bytes]
"""Generator of a text of about the given length in bytes, at most."""


def list_of(item: bytes, length: int) -> bytes:
    """Return the JSON of a list that repeats one item, of at most so many bytes."""
    return b"[" + b",".join([item] * ((length - 2) // (len(item) + 1))) + b"]"


def object_of(length: int) -> bytes:
    """Return the JSON of an object with many short keys in no order, of at most so many bytes."""
    random = Random(1)
    count = length // 16
    return b"{" + b",".join(b'"%x":0' % random.getrandbits(44) for _ in range(count)) + b"}"


def string_of(unit: bytes, length: int) -> bytes:
    """Return the JSON of a string that repeats one unit, of at most so many bytes."""
    return b'"' + unit * ((length - 2) // len(unit)) + b'"'


def list_with_duplicate_key(item: bytes, length: int) -> bytes:
    """Return the JSON of a list that repeats one item, with a duplicate key in its last one."""
    return list_of(item, length - 20)[:-1] + b',{"a":1,"a":2}]'


def _list_maker(item: str) -> Text:
    return partial(list_of, item.encode())


TEXTS: Final[Mapping[str, Text]] = {
    "floats": _list_maker("1.5"),
    "large floats": _list_maker("1e300"),
    "subnormal floats": _list_maker("4.35e-308"),
    "long floats": _list_maker("1234567.123456789012345678e-20"),
    "digits": _list_maker("0"),
    "long integers": _list_maker("9" * 308),
    "words": _list_maker("null"),
    "lists": _list_maker("[]"),
    "objects": _list_maker("{}"),
    "small lists": _list_maker("[1]"),
    "small objects": _list_maker('{"a":[]}'),
    "nested lists": _list_maker("[" * 58 + "1" + "]" * 58),
    "nested objects": _list_maker('{"a":' * 58 + "{}" + "}" * 58),
    "keys": object_of,
    "empty strings": _list_maker('""'),
    "colons": _list_maker('":"'),
    "quotes": _list_maker(r'"\""'),
    "one string": partial(string_of, b"a"),
    "one wide string": partial(string_of, "a😀".encode()),
    "escapes": partial(string_of, rb"\n"),
    "unicode escapes": partial(string_of, rb"\ud83d\ude00"),
    "backslashes": partial(string_of, rb"\\"),
    "spaces": lambda length: b" " * (length - 1) + b"1",
    "a key twice": partial(list_with_duplicate_key, b'{"a":1}'),
    "a key twice in nested lists": partial(list_with_duplicate_key, b"[" * 58 + b"1" + b"]" * 58),
    "cut off": lambda length: list_of(b"[" * 58 + b"1" + b"]" * 58, length)[:-1],
}
