"""Key of a node: digests of everything that its result depends on, kept with its span.

A replay compares the key of a recorded result with the key that the node has now. An incomplete key, from an
older release or with values that could not be determined, never equals another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import msgspec

from engine import values
from engine.expressions import MISSING, ExpressionPath
from json_text import decoding

if TYPE_CHECKING:
    from engine.values import Json

DIGEST_BYTES: Final = 32
PART_BYTES: Final = 16
"""Length of the later digests: the first half of a SHA-256."""
MAX_SOURCES: Final = 12
"""Maximum number of data sources in a key; with more, the key is incomplete."""
UNKNOWN: Final = bytes(PART_BYTES)
"""Digest of values that can't be determined before the node runs."""
_UNKNOWN_SOURCES: Final = b"?"
_SCALARS: Final = frozenset({str, int, float, bool, type(None), type(MISSING)})

DataSourceUse: TypeAlias = tuple[str, int]
"""Id and revision of a data source that a node has used."""


class NodeKey(NamedTuple):
    """Digests of the parts of a key, and the data sources that the node has used."""

    type: bytes
    config: bytes
    mappings: bytes
    input: bytes
    """Resolved input, with the rendered config if that depends on data or is recorded."""
    implementation: bytes
    """Code of the node, and for a loop its body."""
    ports: bytes
    """Ports of the connections that lead to the node."""
    reads: bytes
    """Values outside `data` that late values and conditions can read, and for a loop those of its body."""
    sources: tuple[DataSourceUse, ...]


_PARTS: Final = (DIGEST_BYTES,) * 4 + (PART_BYTES,) * 3
_FIXED_BYTES: Final = sum(_PARTS)
_encode = msgspec.json.Encoder().encode
_source_decoder = decoding.build_decoder(tuple[DataSourceUse, ...])


def decode_key(hashes: bytes | None) -> NodeKey | None:
    """Return the key (digests of type, config, input and so on) in the hashes of a span.

    None if they are incomplete, partly unknown or unreadable.
    """
    if hashes is None or len(hashes) < _FIXED_BYTES:
        return None
    parts: list[bytes] = []
    at = 0
    for size in _PARTS:
        parts.append(hashes[at : at + size])
        at += size
    if UNKNOWN in parts or hashes[at:] == _UNKNOWN_SOURCES:
        return None
    try:
        sources = _source_decoder.decode(hashes[at:]) if len(hashes) > at else ()
    except msgspec.DecodeError:
        return None
    kind, config, mappings, given, implementation, ports, reads = parts
    return NodeKey(kind, config, mappings, given, implementation, ports, reads, sources)


def list_digests(hashes: bytes) -> dict[str, bytes]:
    """Return the digests in a key by name, in their order; those that a shorter key of an older release lacks
    are left out.
    """
    found: dict[str, bytes] = {}
    at = 0
    for name, size in zip(NodeKey._fields[: len(_PARTS)], _PARTS, strict=True):
        if len(hashes) < at + size:
            break
        found[name] = hashes[at : at + size]
        at += size
    return found


def is_same(hashes: bytes | None, recorded: bytes | None) -> bool:
    """Return whether two keys are complete and equal, apart from the data sources; False if either is incomplete."""
    now, before = decode_key(hashes), decode_key(recorded)
    return now is not None and before is not None and now[:-1] == before[:-1]


def decode_sources(hashes: bytes | None) -> tuple[DataSourceUse, ...] | None:
    """Return the data sources that the key of a span names, even if its other parts are unknown; None without
    readable ones.
    """
    if hashes is None or len(hashes) <= _FIXED_BYTES:
        return None
    try:
        return _source_decoder.decode(hashes[_FIXED_BYTES:])
    except msgspec.DecodeError:
        return None


def encode_sources(sources: Collection[DataSourceUse]) -> bytes:
    """Return the data sources of a node as the end of its key: empty for none; more than 12 make the key incomplete."""
    if not sources:
        return b""
    return _encode(sorted(sources)) if len(sources) <= MAX_SOURCES else _UNKNOWN_SOURCES


def digest_part(value: object) -> bytes:
    """Return the digest of a JSON value as a part of a key: 16 bytes; raises `InvalidJson`."""
    return sha256(values.encode_canonical(value)).digest()[:PART_BYTES]


def digest_ports(connections: Iterable[tuple[str, str]]) -> bytes:
    """Return the digest of the connections to a node, pairs of source port and target port, in any order.

    The nodes that they come from don't count: they matter through the input alone.
    """
    return digest_part(sorted(map(list, connections)))


def digest_reads(paths: Sequence[ExpressionPath], scope: Mapping[str, Json]) -> bytes:
    """Return the digest of the values at `paths`, for a key; raises `InvalidJson` and `BudgetExceeded`.

    All paths count, also those that an evaluation may skip: the digest must be known before the node runs.
    """
    if not paths:
        return NO_READS
    found = [path.resolve(scope) for path in paths]
    shown = [[] if value is MISSING else [value] for value in found]
    # Scalars of a run are valid JSON: most reads are such, and need no check.
    is_plain = all(type(value) in _SCALARS for value in found)
    text = _encode(shown) if is_plain else values.encode_json(shown)
    return sha256(text).digest()[:PART_BYTES]


NO_READS: Final = digest_part([])
"""Digest of no values."""
