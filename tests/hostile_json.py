"""JSON texts that cost the most to decode, to write or to compare, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Final, TypeAlias

Text: TypeAlias = Callable[[int], bytes]
"""Makes a text of a length in bytes, or a little less."""


def repeated(item: bytes, length: int) -> bytes:
    """Return a list of one item again and again."""
    return b"[" + b",".join([item] * ((length - 2) // (len(item) + 1))) + b"]"


def members(length: int) -> bytes:
    """Return an object of many short keys in no order."""
    random = Random(1)
    count = length // 16
    return b"{" + b",".join(b'"%x":0' % random.getrandbits(44) for _ in range(count)) + b"}"


def string(unit: bytes, length: int) -> bytes:
    return b'"' + unit * ((length - 2) // len(unit)) + b'"'


def twice(item: bytes, length: int) -> bytes:
    """Return a list whose last item has one key twice."""
    return repeated(item, length - 20)[:-1] + b',{"a":1,"a":2}]'


def _of(item: str) -> Text:
    return partial(repeated, item.encode())


TEXTS: Final[Mapping[str, Text]] = {
    "floats": _of("1.5"),
    "large floats": _of("1e300"),
    "subnormal floats": _of("4.35e-308"),
    "long floats": _of("1234567.123456789012345678e-20"),
    "digits": _of("0"),
    "long integers": _of("9" * 308),
    "words": _of("null"),
    "lists": _of("[]"),
    "objects": _of("{}"),
    "small lists": _of("[1]"),
    "small objects": _of('{"a":[]}'),
    "nested lists": _of("[" * 58 + "1" + "]" * 58),
    "nested objects": _of('{"a":' * 58 + "{}" + "}" * 58),
    "keys": members,
    "empty strings": _of('""'),
    "colons": _of('":"'),
    "quotes": _of(r'"\""'),
    "one string": partial(string, b"a"),
    "one wide string": partial(string, "a😀".encode()),
    "escapes": partial(string, rb"\n"),
    "unicode escapes": partial(string, rb"\ud83d\ude00"),
    "backslashes": partial(string, rb"\\"),
    "spaces": lambda length: b" " * (length - 1) + b"1",
    "a key twice": partial(twice, b'{"a":1}'),
    "a key twice in nested lists": partial(twice, b"[" * 58 + b"1" + b"]" * 58),
    "cut off": lambda length: repeated(b"[" * 58 + b"1" + b"]" * 58, length)[:-1],
}
