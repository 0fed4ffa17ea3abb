"""Conversion of files to values by the parser of their format, within its limits."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from enum import StrEnum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

from msgspec import structs

from engine.run_errors import NodeError
from nodes import config_fields
from nodes.formats import csv_reader, json_reader, xlsx_rows, xml_values

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 20_000_000
HEAD_BYTES = 1_024


class FileFormat(StrEnum):
    AUTO = "auto"
    CSV = "csv"
    JSON = "json"
    JSON_LINES = "json-lines"
    EXCEL = "excel"
    XML = "xml"
    TEXT = "text"


class TextEncoding(StrEnum):
    """Text encodings whose decoders run in linear time."""

    UTF_8 = "utf-8"
    UTF_16 = "utf-16"
    ISO_8859_1 = "iso-8859-1"
    ISO_8859_15 = "iso-8859-15"
    WINDOWS_1250 = "windows-1250"
    WINDOWS_1251 = "windows-1251"
    WINDOWS_1252 = "windows-1252"
    KOI8_R = "koi8-r"
    SHIFT_JIS = "shift_jis"
    EUC_JP = "euc-jp"
    EUC_KR = "euc-kr"
    BIG5 = "big5"
    GB18030 = "gb18030"


FORMAT_BY_SUFFIX: Mapping[str, FileFormat] = {
    ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV,
    ".json": FileFormat.JSON,
    ".jsonl": FileFormat.JSON_LINES,
    ".ndjson": FileFormat.JSON_LINES,
    ".xlsx": FileFormat.EXCEL,
    ".xml": FileFormat.XML,
    ".txt": FileFormat.TEXT,
}
FORMAT_BY_TYPE: Mapping[str, FileFormat] = {
    "text/csv": FileFormat.CSV,
    "text/tab-separated-values": FileFormat.CSV,
    "application/json": FileFormat.JSON,
    "application/x-ndjson": FileFormat.JSON_LINES,
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": FileFormat.EXCEL,
    "application/xml": FileFormat.XML,
    "text/xml": FileFormat.XML,
}
FORMAT_BY_BEGINNING: Mapping[bytes, FileFormat] = {
    b"PK\x03\x04": FileFormat.EXCEL,
    b"{": FileFormat.JSON,
    b"[": FileFormat.JSON,
    b"<?xml": FileFormat.XML,
}


async def parse_file(call: NodeCall) -> Json:
    reference = call.config.get("blob")
    content = await call.services.blobs.get(call.caller, reference, max_bytes=MAXIMUM_BYTES)
    wanted = config_fields.read_choice(call.config, "format", FileFormat)
    if wanted is FileFormat.AUTO:
        label = cast("dict[str, dict[str, str]]", reference)["$blob"]
        wanted = guess_format(content, name=label.get("name", ""), media_type=label.get("type", ""))
    return {"format": wanted.value, **await parse_content(call, content, wanted)}


def guess_format(content: bytes, *, name: str, media_type: str = "") -> FileFormat:
    """Return the format of a file by the suffix of its name, else its media type, else its first bytes, else text."""
    by_name = FORMAT_BY_SUFFIX.get(PurePosixPath(name.lower()).suffix)
    by_type = FORMAT_BY_TYPE.get(media_type.partition(";")[0].strip().lower())
    if by_name or by_type:
        return by_name or by_type or FileFormat.TEXT
    head = content[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    return next(
        (found for begin, found in FORMAT_BY_BEGINNING.items() if head.startswith(begin)), FileFormat.TEXT
    )


async def parse_content(call: NodeCall, content: bytes, wanted: FileFormat) -> dict[str, Json]:
    """Parse a file of this format by the options `encoding`, `csv`, `excel` and `xml` of the config; return the
    parser's output.

    Formats without a parser give their `text`. Raises `NodeError` for invalid content.
    """
    config = call.config
    match wanted:
        case FileFormat.CSV:
            options = config_fields.read_mapping(config, "csv")
            output = await csv_reader.parse_csv(
                _with_config(call, options, text=_decode_text(config, content))
            )
        case FileFormat.EXCEL:
            options = config_fields.read_mapping(config, "excel")
            output = await xlsx_rows.parse_xlsx(_with_config(call, options, file=b64encode(content).decode()))
        case FileFormat.XML:
            options = config_fields.read_mapping(config, "xml")
            output = await xml_values.parse_xml(
                _with_config(call, options, text=_decode_text(config, content))
            )
        case FileFormat.JSON | FileFormat.JSON_LINES:
            form = "lines" if wanted is FileFormat.JSON_LINES else "json"
            output = await json_reader.parse_json(
                _with_config(call, {}, text=_decode_text(config, content), format=form)
            )
        case _:
            output = {"text": _decode_text(config, content)}
    return cast("dict[str, Json]", output)


def _with_config(call: NodeCall, options: Mapping[str, Json], **given: Json) -> NodeCall:
    """Return a copy of a call with the options and the given fields as its config, for the parser of another node."""
    return structs.replace(call, config={**options, **given})


def _decode_text(config: Mapping[str, Json], content: bytes) -> str:
    encoding = config_fields.read_choice(config, "encoding", TextEncoding)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        message = f"Byte {error.start:,} of the file is not {encoding}: choose another `encoding`"
        raise NodeError(message, code="invalid-encoding") from error
    return text.removeprefix("\ufeff")
