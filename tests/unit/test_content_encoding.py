from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.errors import ApiError
from gateway.http.request import PIECE_BYTES, ContentDecoder


def decode_all(encoding: str, *pieces: bytes) -> bytes:
    decoder = ContentDecoder(encoding)
    found = [part for piece in pieces for part in decoder.decode(piece)]
    assert all(len(part) <= PIECE_BYTES for part in found)
    decoder.finish()
    return b"".join(found)


@given(st.binary(max_size=200), st.integers(0, 5_000), st.data())
def test_a_body_comes_whole_wherever_it_is_cut(pattern: bytes, times: int, data: st.DataObject) -> None:
    body = pattern * times
    for encoding, compressed in (
        ("gzip", gzip.compress(body)),
        ("deflate", zlib.compress(body)),
        ("deflate", zlib.compress(body, wbits=-15)),
    ):
        at = data.draw(st.integers(0, len(compressed)))
        assert decode_all(encoding, compressed[:at], b"", compressed[at:]) == body


@given(st.binary(min_size=1, max_size=100))
def test_other_bytes_are_refused_or_are_a_body(raw: bytes) -> None:
    for encoding in ("gzip", "deflate"):
        try:
            decode_all(encoding, raw)
        except ApiError as error:
            assert (error.status, error.code) == (400, "malformed-body")  # noqa: PT017 - either is right


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "zstd"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(ApiError) as refused:
        ContentDecoder(encoding)
    assert refused.value.status == 415
