"""Safe XML parser: a document type declaration, and so entities and external files, is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol
from xml.parsers import expat

from engine.run_errors import NodeError

if TYPE_CHECKING:
    from concurrency.loop_share import LoopShare

CHUNK_BYTES = 16_384
MAXIMUM_TOKEN_BYTES = 1_000_000
"""Maximum size of a tag or comment, which is parsed again with every chunk until it ends."""


class XmlHandler(Protocol):
    """Handler of the events of a document; it may raise `NodeError`."""

    def start(self, name: str, attributes: Mapping[str, str]) -> None: ...
    def text(self, text: str) -> None: ...
    def end(self, name: str) -> None: ...


async def read_xml(raw: bytes, reader: XmlHandler, turn: LoopShare, *, encoding: str | None = None) -> None:
    """Parse a whole document, calling a handler, in `encoding` or (None) the one that the document declares.

    It lets other tasks run. Raises `NodeError` for invalid XML, document types, unknown encodings and very long tokens,
    and the errors of the handler.
    """
    parser = expat.ParserCreate(encoding)
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = _refuse_document_type
    parser.StartElementHandler = reader.start
    parser.CharacterDataHandler = reader.text
    parser.EndElementHandler = reader.end
    try:
        for begin in range(0, len(raw), CHUNK_BYTES):
            parser.Parse(raw[begin : begin + CHUNK_BYTES], False)  # noqa: FBT003 - expat takes it by position
            _check_token(begin - parser.CurrentByteIndex)
            await turn.yield_if_due()
        parser.Parse(b"", True)  # noqa: FBT003 - expat takes it by position
    except expat.ExpatError as error:
        reason = expat.errors.messages.get(error.code, "it is malformed")
        message = f"Line {error.lineno}, column {error.offset + 1} is not valid XML: {reason}"
        raise NodeError(message, code="invalid-xml") from error
    except (LookupError, ValueError) as error:
        raise NodeError(f"The encoding of the XML is not supported: {error}", code="invalid-xml") from error


def _refuse_document_type(name: str, *_identifiers: object) -> None:
    message = (
        f"The XML declares a document type ({name[:40]!r}): send it without <!DOCTYPE …> and its entities"
    )
    raise NodeError(message, code="document-type-refused")


def _check_token(waiting_bytes: int) -> None:
    if waiting_bytes > MAXIMUM_TOKEN_BYTES:
        message = f"One tag or comment of the XML has more than {MAXIMUM_TOKEN_BYTES:,} bytes"
        raise NodeError(message, code="input-too-large")
