"""Decompression of request bodies, in pieces and up to a limit."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from gateway.http.errors import ApiError

PIECE_BYTES: Final = 262_144
"""Maximum decompressed bytes of one piece."""
ACCEPTED: Final = "gzip, deflate"
_GZIP_WINDOW: Final = 31
_RAW_WINDOW: Final = -15
_ZLIB_METHOD: Final = 0x08


class ContentDecoder:
    """Decoder of one body by its `Content-Encoding` (RFC 9110, section 8.4.1)."""

    def __init__(self, encoding: str) -> None:
        """Raise 415 for an encoding other than gzip, deflate and identity."""
        name = encoding.strip().lower().removeprefix("x-")
        if name not in {"", "identity", "gzip", "deflate"}:
            message = "Send the body uncompressed, or compressed with gzip or deflate"
            raise ApiError(415, "unsupported-media-type", message, headers={"Accept-Encoding": ACCEPTED})
        self.is_needed = name in {"gzip", "deflate"}
        self._decompressor = zlib.decompressobj(_GZIP_WINDOW) if name == "gzip" else None
        self._has_begun = False
        self._is_over = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed pieces of the next bytes of a body; raises 400 for malformed bytes."""
        if self._is_over and data:
            raise _malformed()
        has_more = bool(data)
        while has_more and not self._is_over:
            decompressor = self._decompressor or self._begin(data)
            try:
                piece = decompressor.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise _malformed() from error
            data = decompressor.unconsumed_tail
            # zlib may have consumed all input and still hold output that did not fit into the piece.
            has_more = bool(data) or len(piece) == PIECE_BYTES
            self._has_begun = True
            self._is_over = decompressor.eof
            if piece:
                yield piece
            if decompressor.unused_data:
                raise _malformed()

    def finish(self) -> None:
        """Raise 400 when the compressed body is cut short; an empty body is valid."""
        if self._has_begun and not self._is_over:
            raise _malformed()

    def _begin(self, data: bytes) -> zlib._Decompress:
        """Return the decompressor of deflate; some senders omit the zlib wrapper that RFC 9110 requires."""
        window = zlib.MAX_WBITS if data[0] & 0x0F == _ZLIB_METHOD else _RAW_WINDOW
        self._decompressor = zlib.decompressobj(window)
        return self._decompressor


def _malformed() -> ApiError:
    message = "The body is not compressed as its Content-Encoding declares, or is cut short"
    return ApiError(400, "malformed-body", message)
