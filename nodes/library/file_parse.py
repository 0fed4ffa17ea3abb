"""A file becomes values: each format is read by the node that reads it as a text, within that one's limits."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from enum import StrEnum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

from msgspec import structs

from engine.run_errors import NodeError
from nodes import fields
from nodes.library import csv_parse, excel_parse, json_parse, xml_parse

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 20_000_000
HEAD_BYTES = 1_024


class Format(StrEnum):
    AUTO = "auto"
    CSV = "csv"
    JSON = "json"
    JSON_LINES = "json-lines"
    EXCEL = "excel"
    XML = "xml"
    TEXT = "text"


class Encoding(StrEnum):
    """Those whose decoders take no more time than a text is long."""

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


BY_SUFFIX: Mapping[str, Format] = {
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".json": Format.JSON,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".xlsx": Format.EXCEL,
    ".xml": Format.XML,
    ".txt": Format.TEXT,
}
BY_TYPE: Mapping[str, Format] = {
    "text/csv": Format.CSV,
    "text/tab-separated-values": Format.CSV,
    "application/json": Format.JSON,
    "application/x-ndjson": Format.JSON_LINES,
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": Format.EXCEL,
    "application/xml": Format.XML,
    "text/xml": Format.XML,
}
BY_BEGINNING: Mapping[bytes, Format] = {
    b"PK\x03\x04": Format.EXCEL,
    b"{": Format.JSON,
    b"[": Format.JSON,
    b"<?xml": Format.XML,
}


async def run(call: NodeCall) -> Json:
    reference = call.config.get("blob")
    content = await call.services.blobs.get(call.caller, reference, max_bytes=MAXIMUM_BYTES)
    wanted = fields.choice(call.config, "format", Format)
    if wanted is Format.AUTO:
        label = cast("dict[str, dict[str, str]]", reference)["$blob"]
        wanted = guessed(content, name=label.get("name", ""), media_type=label.get("type", ""))
    return {"format": wanted.value, **await parsed(call, content, wanted)}


def guessed(content: bytes, *, name: str, media_type: str = "") -> Format:
    """Return the format of a file by its name, else by its type, else by how it begins."""
    by_name = BY_SUFFIX.get(PurePosixPath(name.lower()).suffix)
    by_type = BY_TYPE.get(media_type.partition(";")[0].strip().lower())
    if by_name or by_type:
        return by_name or by_type or Format.TEXT
    head = content[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((found for begin, found in BY_BEGINNING.items() if head.startswith(begin)), Format.TEXT)


async def parsed(call: NodeCall, content: bytes, wanted: Format) -> dict[str, Json]:
    """Return what the node for a format makes of a file, by the `encoding`, `csv`, `excel` and `xml` of the config."""
    config = call.config
    match wanted:
        case Format.CSV:
            options = fields.mapping(config, "csv")
            output = await csv_parse.run(_with(call, options, text=_text(config, content)))
        case Format.EXCEL:
            options = fields.mapping(config, "excel")
            output = await excel_parse.run(_with(call, options, file=b64encode(content).decode()))
        case Format.XML:
            options = fields.mapping(config, "xml")
            output = await xml_parse.run(_with(call, options, text=_text(config, content)))
        case Format.JSON | Format.JSON_LINES:
            form = "lines" if wanted is Format.JSON_LINES else "json"
            output = await json_parse.run(_with(call, {}, text=_text(config, content), format=form))
        case _:
            output = {"text": _text(config, content)}
    return cast("dict[str, Json]", output)


def _with(call: NodeCall, options: Mapping[str, Json], **given: Json) -> NodeCall:
    """Return the call of another node, with a config of its own."""
    return structs.replace(call, config={**options, **given})


def _text(config: Mapping[str, Json], content: bytes) -> str:
    encoding = fields.choice(config, "encoding", Encoding)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        message = f"Byte {error.start:,} of the file is not {encoding}: choose another `encoding`"
        raise NodeError(message, code="invalid-encoding") from error
    return text.removeprefix("\ufeff")
