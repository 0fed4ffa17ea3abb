"""Strict JSON: values that either database can store and return unchanged, and their differences by path."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from hashlib import sha256
from itertools import chain, islice
from math import isfinite
from types import NoneType
from typing import Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from concurrency import offload
from json_text import decoding, pieces
from json_text.pieces import DuplicateName

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

JsonErrorCode: TypeAlias = Literal[
    "duplicate-key",
    "lone-surrogate",
    "malformed-json",
    "not-finite",
    "not-json",
    "nul-character",
    "number-too-long",
    "too-deep",
    "too-large",
]

MAX_DEPTH: Final = 64
"""Maximum nesting depth of objects and lists; `[]` has a depth of 1."""
MAX_ENCODED_BYTES: Final = 50_000_000
"""Maximum size of an encoded value, above that of any accepted body; a workflow must have multiplied a larger
value.
"""
INLINE_BYTES: Final = 131_072
"""Budget of inline encoding: some milliseconds' work."""
MAX_NUMBER: Final = sys.float_info.max
"""Bound up to which integers stay exact. Larger ones, from 309 digits on, are infinite for readers of floats.
"""
MANY_ITEMS: Final = 32
"""Number of items of a container from which numbers are checked together."""
ITEMS_AT_ONCE: Final = 1_000
"""Number of items that are checked together: brief enough for other threads that wait for the interpreter's lock."""

_KINDS: Final = {
    NoneType: "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "text",
    list: "list",
    dict: "object",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ESCAPED_NUL = rb"\u0000"
_ERROR_POSITION = re.compile(r"\(byte (\d+)\)")
_NO_NUMBERS = (b"NaN", b"Infinity", b"-Infinity")
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")
_RAW_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
_UNPAIRED_AT_END = re.compile(rb'\\u[dD][89abAB][0-9a-fA-F]{2}"')

_decode = decoding.build_decoder().decode
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class InvalidJson(ValueError):
    """JSON that is refused permanently: `code` names the rule, `message` suggests a fix."""

    def __init__(self, code: JsonErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


# ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────


def decode_json(raw: bytes | bytearray | memoryview, *, max_depth: int = MAX_DEPTH) -> Json:
    """Return the value of one JSON text; raises `InvalidJson` if it is malformed or couldn't be stored exactly.

    Duplicate keys, NUL, numbers out of range, lone surrogates and great depth are refused. The decoder
    accepts some of them; they are detected afterwards, which costs less than a slower decoder: without
    duplicate keys, the result has as many keys as the text has colons outside strings. Within
    `offload.try_inline`, a text over 128 KiB raises `BudgetExceeded`.
    """
    raw = bytes(raw)
    if len(raw) <= INLINE_BYTES:
        return _decode_at_once(raw, max_depth)
    offload.require_offloaded()
    try:
        value: Json = pieces.decode_in_pieces(raw, lambda piece: _decode_at_once(piece, max_depth))
    except InvalidJson:
        raise
    except DuplicateName as error:
        raise _duplicate_key_error(error.name) from error
    except RecursionError as error:
        raise _too_deep_error(max_depth) from error
    except ValueError as error:
        raise _decode_error(raw, error) from error
    return value


def _decode_at_once(raw: bytes, max_depth: int) -> Json:
    """Return the value of a text that is decoded as a whole; raises `InvalidJson` as `decode_json` does."""
    try:
        value: Json = _decode(raw)
    except RecursionError as error:
        raise _too_deep_error(max_depth) from error
    except ValueError as error:
        raise _decode_error(raw, error) from error
    keys = _count_keys(value, max_depth)
    if raw.count(b":") != keys or _ESCAPED_NUL in raw:
        _refuse_ambiguous(raw, keys)
    return value


def restore_json(raw: bytes) -> Json:
    """Return the value of a text that `encode_json` has written, without the checks of `decode_json`.

    Raises `ValueError` for malformed JSON.
    """
    value: Json = decoding.decode(raw)
    return value


def _count_keys(value: Json, max_depth: int) -> int:
    """Return the number of keys of all objects; raises `InvalidJson` for depth and for long integers."""
    keys = depth = 0
    level: list[Any] = [[value]]
    while level:
        if depth > max_depth:
            raise _too_deep_error(max_depth)
        depth += 1
        below: list[Any] = []
        for container in level:
            if type(container) is dict:
                keys += len(container)
            items = container.values() if type(container) is dict else container
            for item in _skip_numbers(items) if len(items) >= MANY_ITEMS else items:
                kind = type(item)
                if kind is str:
                    continue
                if kind is dict or kind is list:
                    below.append(item)
                elif kind is int and not -MAX_NUMBER <= item <= MAX_NUMBER:
                    raise _number_too_long_error()
        level = below
    return keys


def _refuse_ambiguous(raw: bytes, keys: int) -> None:
    """Raise `InvalidJson` if the decoded text contains NUL, or an object a key twice.

    `keys` is the number of keys after decoding: a text with more colons outside strings has duplicates.
    """
    text = raw
    if b"\\" in text:
        # Backslashes occur only in strings and pair up from the left. Once the pairs are cut out, a quote
        # behind a backslash is inside its string.
        text = text.replace(rb"\\", b"")
        if _ESCAPED_NUL in text:
            raise _nul_character_error()
        text = text.replace(rb"\"", b"")
    outside_strings = text.split(b'"')[::2]
    if b"".join(outside_strings).count(b":") != keys:
        json.loads(raw, object_pairs_hook=_refuse_duplicate)  # noqa: TID251 - only this decoder reports duplicates


def _refuse_duplicate(pairs: list[tuple[str, object]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise _duplicate_key_error(key)
        seen.add(key)


def _decode_error(raw: bytes, error: ValueError) -> InvalidJson:
    """Return the error that explains why the decoder has refused a text."""
    reason = str(error)
    position = _ERROR_POSITION.search(reason)
    at = int(position.group(1)) if position else len(raw)
    if not raw.strip():
        return InvalidJson("malformed-json", "The JSON text is empty")
    if raw.startswith(_BYTE_ORDER_MARK):
        return InvalidJson("malformed-json", "The JSON begins with a byte order mark: send it without one")
    if reason.startswith("Integer value out of range"):
        return _number_too_long_error()
    if reason.startswith("Number out of range"):
        return InvalidJson("not-finite", "A number is too large: it would be read as infinite")
    if raw.startswith(_NO_NUMBERS, at) or raw.startswith(_NO_NUMBERS, max(at - 1, 0)):
        return InvalidJson("not-finite", f"JSON has no NaN and no Infinity (byte {at}): send null")
    is_unicode_error = isinstance(error, UnicodeDecodeError)
    # At the end of a text the decoder reports the missing second half instead of the surrogate.
    if (
        "surrogate" in reason
        or (is_unicode_error and _RAW_SURROGATE.search(raw))
        or (position is None and _UNPAIRED_AT_END.search(raw, max(len(raw) - 20, 0)))
    ):
        return _lone_surrogate_error()
    if is_unicode_error:
        return InvalidJson("malformed-json", f"The JSON is not valid UTF-8: {reason}")
    if position is None:
        return InvalidJson("malformed-json", "The JSON is malformed: it ends too early")
    return InvalidJson("malformed-json", f"The {reason}")


# ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────


def encode_json(value: object, *, max_bytes: int = MAX_ENCODED_BYTES) -> bytes:
    """Return a value as compact JSON.

    Raises `InvalidJson` if it is larger than `max_bytes` or `decode_json` wouldn't return it unchanged.
    Within `offload.try_inline`, a large value raises `BudgetExceeded`.
    """
    return _encode_checked(value, _encode, max_bytes)


def encode_canonical(value: object) -> bytes:
    """Return the canonical JSON of a value: compact, with sorted keys; raises `InvalidJson`.

    `1` and `1.0` stay different texts.
    """
    return _encode_checked(value, _encode_sorted, MAX_ENCODED_BYTES)


def fingerprint(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal; raises `InvalidJson`."""
    return sha256(encode_canonical(value)).hexdigest()


def value_as_text(value: Json, *, max_bytes: int = MAX_ENCODED_BYTES) -> str:
    """Return a value as part of a text: texts unchanged, null as the empty text, others as compact JSON.

    Raises `InvalidJson` if that JSON is larger than `max_bytes`; texts have no limit.
    """
    if type(value) is str:
        return value
    if type(value) is int:
        return str(value)
    return "" if value is None else encode_json(value, max_bytes=max_bytes).decode()


def _encode_checked(value: object, encoder: Callable[[object], bytes], max_bytes: int) -> bytes:
    _check_value(value, max_bytes)
    try:
        raw = encoder(value)
    except UnicodeEncodeError as error:
        raise _lone_surrogate_error() from error
    if len(raw) > max_bytes:
        raise _too_large_error(max_bytes)
    if _ESCAPED_NUL in raw and _ESCAPED_NUL in raw.replace(rb"\\", b""):
        raise _nul_character_error()
    return raw


def _check_value(value: object, max_bytes: int) -> None:
    """Raise `InvalidJson` for values that the encoder would silently change, and for too deep or too large ones.

    A list may occur many times in a value, so that its JSON is far larger than the value in memory: the
    minimum size of the JSON is summed up on the way. Within `offload.try_inline`, a large value raises
    `BudgetExceeded`.
    """
    least_bytes = depth = 0
    most_bytes = offload.budget(max_bytes, INLINE_BYTES)
    level: list[Any] = [(value,)]
    while level:
        if depth > MAX_DEPTH:
            raise _too_deep_error(MAX_DEPTH)
        depth += 1
        below: list[Any] = []
        for container in level:
            least_bytes += 2 * len(container)
            if least_bytes > most_bytes:
                offload.require_offloaded()
                raise _too_large_error(max_bytes)
            items = container
            if type(container) is dict:
                least_bytes += _count_key_characters(container)
                items = container.values()
            for item in _skip_numbers(items) if len(items) >= MANY_ITEMS else items:
                kind = type(item)
                if kind is str:
                    least_bytes += len(item)
                elif kind is dict or kind is list:
                    below.append(item)
                else:
                    _check_scalar(item)
            if least_bytes > most_bytes:
                offload.require_offloaded()
                raise _too_large_error(max_bytes)
        level = below


def _check_scalar(value: object) -> None:
    if type(value) is int or type(value) is float:
        if not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise _number_too_long_error() if type(value) is int else _not_finite_error(value)
    elif value is not None and type(value) is not bool:
        raise InvalidJson("not-json", f"A value of the type {type(value).__name__} is not JSON")


def _skip_numbers(items: Iterable[Any]) -> Iterable[Any]:
    """Return the items of a large container except those in batches of valid numbers of one type.

    Native code checks such a batch, such as a part of a vector, several times as fast as a loop over its items.
    """
    waiting = iter(items)
    batches = iter(lambda: tuple(islice(waiting, ITEMS_AT_ONCE)), ())
    return chain.from_iterable(batch for batch in batches if not _are_valid_numbers(batch))


def _are_valid_numbers(items: Sequence[Any]) -> bool:
    """Return whether all items are integers, or all are floats, and JSON can have them; there is at least one."""
    if (kind := type(items[0])) not in {int, float} or set(map(type, items)) != {kind}:
        return False
    if kind is float:
        return all(map(isfinite, items))
    return bool(min(items) >= -MAX_NUMBER and max(items) <= MAX_NUMBER)


def _count_key_characters(keys: Iterable[str]) -> int:
    try:
        return len("".join(keys))
    except TypeError as error:
        raise InvalidJson("not-json", "A key of an object is not a text") from error


def count_values(value: Json, most: int) -> int:
    """Return the number of values in a value, itself included; counting stops once it reaches `most`."""
    count = 1
    level = [value]
    while level and count < most:
        below: list[Json] = []
        for container in level:
            if type(container) is dict or type(container) is list:
                count += len(container)
                if count >= most:
                    break
                below.extend(container.values() if type(container) is dict else container)
        level = below
    return count


# ── comparison ──────────────────────────────────────────────────────────────────────────────────────────────


def type_name(value: object) -> str:
    """Return the user-facing name of a value's type, such as `text`, `number` or `list`."""
    return _KINDS.get(type(value), type(value).__name__)


def equal_json(left: Json, right: Json) -> bool:
    """Return whether two values are equal as JSON, also inside lists and objects.

    `1` and `1.0` are equal, `1` and `true` are not; the order of keys doesn't matter. Containers are compared
    one by one, since Python's own comparison of large values holds the interpreter's lock throughout.
    """
    waiting: list[tuple[Any, Any]] = [([left], [right])]
    while waiting:
        one, other = waiting.pop()
        if type(one) is not type(other) or len(one) != len(other):
            return False
        if type(one) is dict:
            if one.keys() != other.keys():
                return False
            other = [other[key] for key in one]
            one = one.values()
        for item, counterpart in zip(one, other, strict=True):
            kind = type(item)
            if kind is dict or kind is list:
                if type(counterpart) is not kind:
                    return False
                if item is not counterpart:
                    waiting.append((item, counterpart))
            elif item != counterpart or (kind is bool) is not (type(counterpart) is bool):
                return False
    return True


def identity_key(value: Json) -> Hashable:
    """Return a hashable key that two JSON values share if, and only if, `equal_json` holds."""
    if type(value) is list:
        return ("list", *map(identity_key, value))
    if type(value) is dict:
        return ("object", frozenset((key, identity_key(item)) for key, item in value.items()))
    return (bool, value) if type(value) is bool else value  # type: ignore[return-value]  # a scalar


# ── differences by path, such as `rows[0].currency` ─────────────────────────────────────────────────────────


class Missing(Enum):
    """Marker of a side that has no value at a path."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING


class PathChange(Struct, frozen=True):
    """Values at a path that differ; a side without a value has `MISSING`."""

    path: str
    """Empty for the whole value."""
    before: Json | Missing
    after: Json | Missing


class ValueDifference(Struct, frozen=True):
    """Differences between two values."""

    changes: Sequence[PathChange]
    equal_paths: int
    """Number of equal values that are neither objects nor lists."""
    is_cut: bool
    """Whether there are more changes."""


def compare_values(before: Json | Missing, after: Json | Missing, *, at_most: int) -> ValueDifference:
    """Return the first `at_most` differences of two values, with their paths, and the number of equal values seen that
    are neither objects nor lists.

    Lists are compared by position. The result says whether there are more differences.
    """
    changes: list[PathChange] = []
    equal = 0
    # A stack instead of recursion: values may be nested deeper than Python's calls.
    left: list[Iterator[tuple[str, Json | Missing, Json | Missing]]] = [iter([("", before, after)])]
    while left:
        pair = next(left[-1], None)
        if pair is None:
            left.pop()
            continue
        path, one, other = pair
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            left.append(_pair_fields(path, one, other))
        elif isinstance(one, list) and isinstance(other, list):
            left.append(_pair_items(path, one, other))
        elif one is MISSING or other is MISSING or not equal_json(one, other):
            if one is not other:
                if len(changes) >= at_most:
                    return ValueDifference(changes, equal, is_cut=True)
                changes.append(PathChange(path, one, other))
        else:
            equal += 1
    return ValueDifference(changes, equal, is_cut=False)


def _pair_fields(
    path: str, before: Mapping[str, Json], after: Mapping[str, Json]
) -> Iterator[tuple[str, Json | Missing, Json | Missing]]:
    for key in {**before, **after}:
        yield _join_path(path, key), before.get(key, MISSING), after.get(key, MISSING)


def _pair_items(
    path: str, before: Sequence[Json], after: Sequence[Json]
) -> Iterator[tuple[str, Json | Missing, Json | Missing]]:
    for index in range(max(len(before), len(after))):
        yield (
            f"{path}[{index}]",
            before[index] if index < len(before) else MISSING,
            after[index] if index < len(after) else MISSING,
        )


def _join_path(path: str, key: str) -> str:
    if not _PLAIN_KEY.match(key):
        escaped = key.replace("\\", "\\\\").replace('"', '\\"')
        return f'{path}["{escaped}"]'
    return f"{path}.{key}" if path else key


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────


def _too_deep_error(max_depth: int) -> InvalidJson:
    return InvalidJson("too-deep", f"Objects and lists nest more than {max_depth} deep")


def _too_large_error(max_bytes: int) -> InvalidJson:
    return InvalidJson("too-large", f"The value takes more than {max_bytes:,} bytes as JSON")


def _duplicate_key_error(key: str) -> InvalidJson:
    return InvalidJson("duplicate-key", f"The key {key[:100]!r} occurs more than once in one object")


def _number_too_long_error() -> InvalidJson:
    return InvalidJson("number-too-long", "A whole number has more than 308 digits: send it as a text")


def _not_finite_error(number: object) -> InvalidJson:
    return InvalidJson("not-finite", f"JSON can't hold the number {number}: use null")


def _nul_character_error() -> InvalidJson:
    return InvalidJson("nul-character", "A text contains the character NUL (U+0000), which can't be stored")


def _lone_surrogate_error() -> InvalidJson:
    return InvalidJson("lone-surrogate", "A text contains half of a surrogate pair, which is no character")
