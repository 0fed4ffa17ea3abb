"""Decode JSON text at a cost that depends only on its length.

msgspec by itself takes 8 µs for a number such as `1e300`, with the interpreter's lock held: a megabyte of
them stops every thread of a process for seconds. This module builds every decoder of the project, with a hook
for such numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import isfinite
from typing import Any, Final, TypeVar, overload

from msgspec import inspect
from msgspec.json import Decoder  # noqa: TID251 - the one place that makes them

from json_text import pieces

Kind = TypeVar("Kind")

_COLLECTIONS: Final = (inspect.CollectionType, inspect.DictType)


@overload
def build_decoder() -> Decoder[Any]: ...
@overload
def build_decoder(kind: type[Kind]) -> Decoder[Kind]: ...
@overload
def build_decoder(kind: object) -> Decoder[Any]: ...


def build_decoder(kind: object = Any) -> Decoder[Any]:
    """Return a decoder of JSON into a type, which refuses infinite numbers.

    Raises `TypeError` for a type with a float inside a list or a mapping: msgspec calls the hook that refuses
    them for `Any` alone, and decodes a field of type float by itself. A single float is harmless, a list of
    floats is not. Where a client could repeat a field many times, screen the text first, as `engine.values`
    does.
    """
    for part in _iterate_types(inspect.type_info(kind), set()):
        if isinstance(part, _COLLECTIONS) and any(_is_float(inner) for inner in _iterate_types(part, set())):
            raise TypeError(f"{kind} holds a collection of floats: decode it as Any, then convert it")
    return Decoder(kind, float_hook=_parse_finite_float)


@overload
def decode(text: bytes | str) -> Any: ...  # noqa: ANN401 - any JSON value
@overload
def decode(text: bytes | str, kind: type[Kind]) -> Kind: ...


def decode(text: bytes | str, kind: object = Any) -> Any:
    """Decode a JSON text to a value of a type; any JSON value by default.

    Raises `ValueError` for malformed JSON (its subclass `msgspec.ValidationError` for another type), and
    `RecursionError` for deep nesting. A text of over 131,072 bytes is decoded in pieces if the type is `Any`,
    so that other threads run in between. If two members have the same name, the second wins.
    """
    decode_whole = _get_decoder(kind).decode
    if kind is not Any or len(text) <= pieces.LONG_BYTES:
        return decode_whole(text)
    try:
        return pieces.decode_in_pieces(text.encode() if isinstance(text, str) else bytes(text), decode_whole)
    except pieces.DuplicateName:
        return decode_whole(text)


@cache
def _get_decoder(kind: object) -> Decoder[Any]:
    """Return the decoder of a type, built once; raises `TypeError` as `build_decoder` does."""
    return build_decoder(kind)


def _iterate_types(node: object, seen: set[int]) -> Iterator[object]:
    """Yield the msgspec descriptions of types and fields in `node`, itself included, each once.

    `seen` holds the `id()` of those that were yielded, and is extended.
    """
    if isinstance(node, tuple):
        for item in node:
            yield from _iterate_types(item, seen)
    elif isinstance(node, inspect.Type | inspect.Field) and id(node) not in seen:
        seen.add(id(node))
        yield node
        for name in node.__struct_fields__:
            yield from _iterate_types(getattr(node, name), seen)


def _is_float(part: object) -> bool:
    """Return whether a type description of msgspec is exactly a float."""
    return type(part) is inspect.FloatType


def _parse_finite_float(text: str) -> float:
    """Return the number of a JSON text; raises `ValueError` if it would be infinite.

    A Python function, unlike the built-in `float`, lets other threads run between two numbers.
    """
    number = float(text)
    if not isfinite(number):
        raise ValueError("Number out of range")
    return number
