"""Object keys that every server, proxy and file system interprets in the same way; others are refused."""

from __future__ import annotations

import re

from engine.run_errors import NodeError

MAX_KEY_BYTES = 1_024
UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def require_object_key(key: str) -> str:
    """Return an object key unchanged if it is valid.

    Raises `NodeError` for an empty one, over 1,024 bytes, a slash at the start, `.` or `..` between slashes, and
    control characters.
    """
    if not key or len(require_key_prefix(key).encode()) > MAX_KEY_BYTES:
        raise NodeError(f"A key must have 1 to {MAX_KEY_BYTES:,} bytes", code="invalid-key")
    if key.startswith("/") or any(part in {".", ".."} for part in key.split("/")):
        message = f"The key {key[:100]!r} begins with a slash, or has `.` or `..` between slashes"
        raise NodeError(message, code="invalid-key")
    return key


def require_key_prefix(text: str) -> str:
    """Return a key, or the beginning of one, unchanged; raises `NodeError` if it has control characters."""
    if UNUSABLE.search(text):
        raise NodeError("A key can't have control characters", code="invalid-key")
    return text
