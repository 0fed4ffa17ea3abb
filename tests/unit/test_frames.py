from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.values import Json
from nodes.sandbox import frames
from nodes.sandbox.frames import HEADER, FrameTag, InvalidFrame, ValueAssembler

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=8),
    max_leaves=40,
)


def assemble_value(sent: list[bytes]) -> Json:
    assembly = ValueAssembler()
    for each in sent:
        length, tag = frames.parse_header(each[: HEADER.size])
        assert length == len(each) - HEADER.size
        assembly.add(tag, each[HEADER.size :])
    return assembly.value()


@given(VALUES)
def test_a_value_arrives_unchanged_in_any_pieces(value: Json) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "PIECE_BYTES", 10)
        assert assemble_value(list(frames.encode_value(value))) == value


def test_no_piece_of_a_large_value_is_large() -> None:
    value: Json = {
        "rows": [{"a": n, "b": [str(n)] * 3} for n in range(30_000)],
        "one": {"x" * n: n for n in range(900)},
    }
    sent = list(frames.encode_value(value))
    assert max(map(len, sent)) < 2 * frames.PIECE_BYTES
    assert assemble_value(sent) == value


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [(FrameTag.PART, b"[]")],
        [(FrameTag.PART, b"[1, 2]")],
        [(FrameTag.PART, b"{}")],
        [(FrameTag.PART, b"[1")],
        [(FrameTag.PART, b"1")],
        [(FrameTag.PART, b"[" * 100_000)],
        [(FrameTag.CLOSE, b"")],
        [(FrameTag.OPEN_LIST, b"null")],
        [(FrameTag.OPEN_LIST, b'"a"')],
        [(FrameTag.OPEN_OBJECT, b"null"), (FrameTag.OPEN_LIST, b"null")],
        [(FrameTag.OPEN_OBJECT, b"null"), (FrameTag.PART, b"[1]")],
        [(FrameTag.OPEN_LIST, b"null")] * 1_000,
        [(FrameTag.JOB, b"{}")],
    ],
)
def test_frames_that_form_no_value_are_refused(sent: list[tuple[FrameTag, bytes]]) -> None:
    with pytest.raises(InvalidFrame):
        assemble_value([frames.encode_frame(tag, body) for tag, body in sent])


def test_a_malformed_frame_is_refused() -> None:
    with pytest.raises(InvalidFrame):
        frames.parse_header(HEADER.pack(1, 99))
    with pytest.raises(InvalidFrame):
        frames.decode_frame(
            frames.decode_failure, msgspec.json.encode({"code": "A B", "message": "", "retryable": False})
        )
