"""Compute the hash of a value, or its HMAC with a key."""

from __future__ import annotations

import binascii
import hashlib
import hmac
from base64 import b64decode, b64encode
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from engine.values import InvalidJson, encode_canonical, encode_json
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 10_000_000
"""The slowest hash takes a twentieth of a second for this size."""
HMAC_PREFIX = "hmac-"


class HashAlgorithmName(StrEnum):
    SHA256 = "sha256"
    SHA512 = "sha512"
    SHA1 = "sha1"
    MD5 = "md5"
    BLAKE2B = "blake2b"
    HMAC_SHA256 = "hmac-sha256"
    HMAC_SHA512 = "hmac-sha512"
    HMAC_SHA1 = "hmac-sha1"
    HMAC_MD5 = "hmac-md5"


class KeyEncoding(StrEnum):
    TEXT = "text"
    HEX = "hex"
    BASE64 = "base64"


class DigestEncoding(StrEnum):
    HEX = "hex"
    BASE64 = "base64"


def run(call: NodeCall) -> Json:
    config = call.config
    algorithm = config_fields.read_choice(config, "algorithm", HashAlgorithmName)
    value = _encode_value(config)
    digest = _compute_digest(algorithm, value, config)
    is_hex = config_fields.read_choice(config, "encoding", DigestEncoding) is DigestEncoding.HEX
    written = digest.hex() if is_hex else b64encode(digest).decode()
    return {"hash": written, "algorithm": algorithm.value, "bytes": len(value)}


def _compute_digest(algorithm: HashAlgorithmName, value: bytes, config: Mapping[str, Json]) -> bytes:
    if not algorithm.startswith(HMAC_PREFIX):
        return hashlib.new(algorithm, value, usedforsecurity=False).digest()
    key = _decode_bytes(
        "key",
        config_fields.read_text(config, "key"),
        config_fields.read_choice(config, "keyEncoding", KeyEncoding),
    )
    if not key:
        raise NodeError(f"`key` is empty: {algorithm} needs one", code="invalid-config")
    return hmac.digest(key, value, algorithm.removeprefix(HMAC_PREFIX))


def _encode_value(config: Mapping[str, Json]) -> bytes:
    """Return the bytes to hash: of a text in its encoding, of another value as canonical JSON; raises `NodeError`."""
    given = config["value"]
    encoding = config_fields.read_choice(config, "valueEncoding", KeyEncoding)
    if isinstance(given, str):
        _check_size(len(given) if encoding is KeyEncoding.TEXT else len(given) // 2)
        value = _decode_bytes("value", given, encoding)
    elif encoding is KeyEncoding.TEXT:
        value = _encode_canonical(given)
    else:
        raise config_fields.invalid_field("value", f"a text in {encoding}", given)
    _check_size(len(value))
    return value


def _encode_canonical(value: Json) -> bytes:
    try:
        # Stops at the limit, unlike `encode_canonical`.
        encode_json(value, max_bytes=MAXIMUM_BYTES)
        return encode_canonical(value)
    except InvalidJson as error:
        code = "input-too-large" if error.code == "too-large" else "invalid-value"
        raise NodeError(f"`value` can't be hashed: {error.message}", code=code) from error


def _decode_bytes(name: str, text: str, encoding: KeyEncoding) -> bytes:
    try:
        match encoding:
            case KeyEncoding.TEXT:
                return text.encode()
            case KeyEncoding.HEX:
                return bytes.fromhex(text)
            case KeyEncoding.BASE64:
                return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        # The error about a key must not contain the key.
        raise NodeError(f"`{name}` is not {encoding}", code="invalid-encoding") from error


def _check_size(size: int) -> None:
    if size > MAXIMUM_BYTES:
        message = f"`value` has {size:,} bytes; at most {MAXIMUM_BYTES:,} are hashed"
        raise NodeError(message, code="input-too-large")
