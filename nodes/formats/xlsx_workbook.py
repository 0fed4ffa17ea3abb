"""Parser for Excel workbooks (.xlsx), zip archives of XML that are unpacked and parsed in pieces within limits.

Only existing cells are kept: a sheet with one in its first and one in its last corner is as small as any.
"""

from __future__ import annotations

import io
import math
import posixpath
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING

from msgspec import Struct, field

from engine.run_errors import NodeError
from nodes import output_sizes
from nodes.formats import xml_reader

if TYPE_CHECKING:
    from concurrency.loop_share import LoopShare
    from engine.values import Json

MAXIMUM_FILE_BYTES = 10_000_000
MAXIMUM_UNPACKED_BYTES = 50_000_000
MAXIMUM_ENTRIES = 2_000
MAXIMUM_ELEMENTS = 4_000_000
"""Maximum number of XML elements: some six seconds, shared with others."""
MAXIMUM_CELLS = 500_000
MAXIMUM_STRINGS = 500_000
MAXIMUM_COLUMN = 16_384
MAXIMUM_EXACT = 2**53
CHUNK_BYTES = 65_536
MAX_DAYS = 2_950_000
"""More days are beyond the year 9976."""
DAYS_TO_LEAP_DAY = 60
DAY_MILLISECONDS = 86_400_000

DIRECTORY_ENTRY = b"PK\x01\x02"
OLD_FORMAT = b"\xd0\xcf\x11\xe0"
"""First bytes of `.xls` files and of password-protected workbooks."""
CELL_REFERENCE = re.compile(r"([A-Z]{1,3})([1-9][0-9]{0,6})")
NUMBER_PATTERN = re.compile(r"[+-]?[0-9]{0,400}\.?[0-9]{1,400}(?:[eE][+-]?[0-9]{1,4})?")
WHOLE_PATTERN = re.compile(r"[0-9]{1,9}")
ESCAPE_PATTERN = re.compile(r"_x([0-9A-Fa-f]{4})_")
LITERAL_PARTS = re.compile(r'"[^"]*"|\\.|[_*].|\[(?![hms]+\])[^\]]*\]|am/pm|a/p', re.DOTALL)
"""Parts of a number format without dates: quoted texts, fillers, colors, conditions."""
ELAPSED_PATTERN = re.compile(r"\[[hms]+\]")


class NumberDisplay(Enum):
    """Kind of value that a format displays a number as."""

    NUMBER = "number"
    DATE = "date"
    MOMENT = "moment"
    TIME = "time"


BUILT_IN_FORMATS: Mapping[int, NumberDisplay] = {
    **dict.fromkeys([*range(14, 18), *range(27, 32), 36, *range(50, 59)], NumberDisplay.DATE),
    **dict.fromkeys([*range(18, 22), *range(32, 36), 45, 47], NumberDisplay.TIME),
    22: NumberDisplay.MOMENT,
}
"""Built-in formats of every workbook, by number."""


class SheetRow(Struct):
    """Existing cells of a row by column, both counted from 1."""

    number: int
    cells: dict[int, Json] = field(default_factory=dict)


class XlsxWorkbook:
    """Opened workbook: its sheets by name, with shared strings and styles."""

    def __init__(self, archive: ZipArchive) -> None:
        self._archive = archive
        self._sheets: dict[str, str] = {}
        self._strings: list[str] = []
        self._styles: list[NumberDisplay] = []
        self._counts_from_1904 = False

    @property
    def sheets(self) -> Sequence[str]:
        """Names of all worksheets, in order."""
        return list(self._sheets)

    async def open(self) -> None:
        """Read everything except the cells: the sheets, shared texts and number formats; needed before `read_rows`.

        Raises `NodeError` for a file that is no workbook, or too large unpacked.
        """
        main = next(
            (
                part
                for kind, part in (await self._read_relationships("")).values()
                if kind == "officeDocument"
            ),
            "",
        )
        if not self._archive.has(main):
            raise _invalid_workbook("it has no `officeDocument`")
        parts = await self._read_relationships(main)
        contents = WorkbookContents()
        await self._archive.read_part(main, contents)
        self._counts_from_1904 = contents.counts_from_1904
        for name, identifier in contents.sheets:
            kind, part = parts.get(identifier, ("", ""))
            if kind == "worksheet" and self._archive.has(part):
                self._sheets[name] = part
        for kind, part in parts.values():
            if kind == "sharedStrings" and self._archive.has(part):
                strings = SharedStrings()
                await self._archive.read_part(part, strings)
                self._strings = strings.strings
            if kind == "styles" and self._archive.has(part):
                styles = CellStyles()
                await self._archive.read_part(part, styles)
                self._styles = styles.shows

    async def read_rows(self, sheet: str) -> Sequence[SheetRow]:
        """Return the rows of a sheet that have values, in order.

        Raises `NodeError` for invalid XML and exceeded limits, `KeyError` for an unknown sheet.
        """
        reader = SheetCells(self._strings, self._styles, counts_from_1904=self._counts_from_1904)
        await self._archive.read_part(self._sheets[sheet], reader)
        return reader.rows

    async def _read_relationships(self, part: str) -> dict[str, tuple[str, str]]:
        """Return the relationships of a part of the workbook: kind and name of each related part, by identifier; empty
        if it has none.

        Raises `NodeError`.
        """
        folder, name = posixpath.split(part)
        related = posixpath.join(folder, "_rels", f"{name}.rels")
        if not self._archive.has(related):
            return {}
        relationships = WorkbookRelationships(folder)
        await self._archive.read_part(related, relationships)
        return relationships.parts


class ZipArchive:
    """Zip archive in memory, unpacked only up to the limits."""

    def __init__(self, raw: bytes, turn: LoopShare) -> None:
        if raw.startswith(OLD_FORMAT):
            raise _invalid_workbook(
                "it is an old `.xls`, or protected by a password: save it as `.xlsx` without one"
            )
        if raw.count(DIRECTORY_ENTRY) > MAXIMUM_ENTRIES:
            message = f"The workbook holds more than {MAXIMUM_ENTRIES:,} files"
            raise NodeError(message, code="too-many-entries")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(raw))
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _invalid_workbook("it is not a zip archive") from error
        self._turn = turn
        self._names = frozenset(self._zip.namelist())
        self._bytes_left = MAXIMUM_UNPACKED_BYTES
        self._elements_left = MAXIMUM_ELEMENTS

    def has(self, name: str) -> bool:
        return name in self._names

    async def read_part(self, name: str, part: WorkbookPart) -> None:
        """Unpack the file `name` of the archive and parse its XML with the handler `part`.

        The limit of elements counts for all files together. Raises `NodeError` for invalid XML and exceeded limits,
        `KeyError` for a missing file.
        """
        part.elements_left = self._elements_left
        await xml_reader.read_xml(await self._unpack(name), part, self._turn)
        self._elements_left = part.elements_left

    async def _unpack(self, name: str) -> bytes:
        """Return the unpacked content of a file of the archive.

        Raises `KeyError` for a missing file, and `NodeError` for a damaged or encrypted file and beyond 50 MB in total.
        """
        entry = self._zip.getinfo(name)
        if entry.flag_bits & 1 or entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise _invalid_workbook(f"{name[:100]} is encrypted or packed in an unusual way")
        # At most the stated size of an entry is unpacked.
        self._bytes_left -= entry.file_size
        if self._bytes_left < 0:
            message = f"The workbook has more than {MAXIMUM_UNPACKED_BYTES:,} bytes when it is unpacked"
            raise NodeError(message, code="input-too-large")
        pieces: list[bytes] = []
        try:
            with self._zip.open(entry) as packed:
                while piece := packed.read(CHUNK_BYTES):
                    pieces.append(piece)
                    await self._turn.yield_if_due()
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
            raise _invalid_workbook(f"{name[:100]} in it is damaged") from error
        return b"".join(pieces)


def _invalid_workbook(reason: str) -> NodeError:
    return NodeError(f"`file` is not an Excel workbook (.xlsx): {reason}", code="invalid-workbook")


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────


class WorkbookPart:
    """Reader of one part of a workbook; names are without their prefixes."""

    elements_left = 0

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self.elements_left -= 1
        if self.elements_left < 0:
            message = f"The workbook has more than {MAXIMUM_ELEMENTS:,} elements"
            raise NodeError(message, code="too-many-elements")
        self.begin(_local_name(name), {_local_name(key): value for key, value in attributes.items()})

    def end(self, name: str) -> None:
        self.finish(_local_name(name))

    def begin(self, name: str, attributes: Mapping[str, str]) -> None: ...
    def text(self, text: str) -> None: ...
    def finish(self, name: str) -> None: ...


def _local_name(name: str) -> str:
    return name.rpartition(":")[2]


class WorkbookRelationships(WorkbookPart):
    """Relationships of a part to others."""

    def __init__(self, folder: str) -> None:
        self.parts: dict[str, tuple[str, str]] = {}
        self._folder = folder

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "Relationship" and attributes.get("TargetMode") != "External":
            kind = attributes.get("Type", "").rpartition("/")[2]
            target = posixpath.normpath(posixpath.join("/", self._folder, attributes.get("Target", "")))
            self.parts[attributes.get("Id", "")] = (kind, target.lstrip("/"))


class WorkbookContents(WorkbookPart):
    """Sheets of a workbook: name and identifier of the part."""

    def __init__(self) -> None:
        self.sheets: list[tuple[str, str]] = []
        self.counts_from_1904 = False

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "sheet":
            self.sheets.append((attributes.get("name", ""), attributes.get("id", "")))
        elif name == "workbookPr":
            self.counts_from_1904 = attributes.get("date1904") in {"1", "true"}


class SharedStrings(WorkbookPart):
    """Texts that cells share."""

    def __init__(self) -> None:
        self.strings: list[str] = []
        self._pieces: list[str] = []
        self._is_text = False
        self._is_phonetic = False

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:  # noqa: ARG002 - not needed here
        if name == "si":
            self._pieces = []
        elif name == "rPh":
            self._is_phonetic = True
        elif name == "t":
            self._is_text = not self._is_phonetic

    def text(self, text: str) -> None:
        if self._is_text:
            self._pieces.append(text)

    def finish(self, name: str) -> None:
        if name == "t":
            self._is_text = False
        elif name == "rPh":
            self._is_phonetic = False
        elif name == "si":
            self.strings.append(_unescape("".join(self._pieces)))
            if len(self.strings) > MAXIMUM_STRINGS:
                message = f"The workbook has more than {MAXIMUM_STRINGS:,} texts"
                raise NodeError(message, code="too-many-cells")


class CellStyles(WorkbookPart):
    """Number formats of the cell styles, by index."""

    def __init__(self) -> None:
        self.shows: list[NumberDisplay] = []
        self._formats = dict(BUILT_IN_FORMATS)
        self._within = ""

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        if name in {"numFmts", "cellXfs"}:
            self._within = name
        elif name == "numFmt" and self._within == "numFmts":
            self._formats[_parse_whole(attributes.get("numFmtId"))] = _display_of_format(
                attributes.get("formatCode", "")
            )
        elif name == "xf" and self._within == "cellXfs":
            self.shows.append(
                self._formats.get(_parse_whole(attributes.get("numFmtId")), NumberDisplay.NUMBER)
            )

    def finish(self, name: str) -> None:
        if name == self._within:
            self._within = ""


class SheetCells(WorkbookPart):
    """Cells of one sheet."""

    def __init__(
        self, strings: Sequence[str], styles: Sequence[NumberDisplay], *, counts_from_1904: bool
    ) -> None:
        self.rows: list[SheetRow] = []
        self._strings = strings
        self._styles = styles
        self._counts_from_1904 = counts_from_1904
        self._count = 0
        self._characters = 0
        self._row = SheetRow(0)
        self._column = 0
        self._kind = "n"
        self._shows = NumberDisplay.NUMBER
        self._pieces: list[str] = []
        self._is_value = False
        self._is_phonetic = False

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "row":
            self._row = SheetRow(_parse_whole(attributes.get("r"), otherwise=self._row.number + 1))
            self._column = 0
        elif name == "c":
            self._begin_cell(attributes)
        elif name == "rPh":
            self._is_phonetic = True
        elif name in {"v", "t"}:
            self._is_value = not self._is_phonetic

    def text(self, text: str) -> None:
        if self._is_value:
            self._pieces.append(text)

    def finish(self, name: str) -> None:
        if name in {"v", "t"}:
            self._is_value = False
        elif name == "rPh":
            self._is_phonetic = False
        elif name == "c":
            self._end_cell()
        elif name == "row" and self._row.cells:
            self.rows.append(self._row)

    def _begin_cell(self, attributes: Mapping[str, str]) -> None:
        self._count += 1
        if self._count > MAXIMUM_CELLS:
            raise NodeError(f"The sheet has more than {MAXIMUM_CELLS:,} cells", code="too-many-cells")
        reference = CELL_REFERENCE.fullmatch(attributes.get("r", ""))
        self._column = _column_number(reference.group(1)) if reference else self._column + 1
        if self._column > MAXIMUM_COLUMN:
            raise _invalid_workbook(f"a sheet has no column beyond number {MAXIMUM_COLUMN:,}")
        style = _parse_whole(attributes.get("s"))
        self._shows = self._styles[style] if 0 <= style < len(self._styles) else NumberDisplay.NUMBER
        self._kind = attributes.get("t", "n")
        self._pieces = []

    def _end_cell(self) -> None:
        value = self._convert_value("".join(self._pieces))
        self._characters += len(value) if isinstance(value, str) else 0
        if self._characters > output_sizes.MAXIMUM_BYTES:
            message = f"The texts of the sheet have more than {output_sizes.MAXIMUM_BYTES:,} characters"
            raise NodeError(message, code="output-too-large")
        if value is not None:
            self._row.cells[self._column] = value

    def _convert_value(self, written: str) -> Json:
        """Return the value of the cell that ends from its text, null for an empty cell: formulas by their last result,
        errors as Excel shows them, dates as ISO texts.

        Raises `NodeError` for a reference to a missing text and an invalid number.
        """
        match self._kind:
            case "s":
                place = _parse_whole(written, otherwise=-1)
                if not 0 <= place < len(self._strings):
                    raise _invalid_workbook("a cell refers to a missing text")
                return self._strings[place]
            case "b":
                return written.strip() in {"1", "true"}
            case "inlineStr" | "str" | "e" | "d":
                return _unescape(written)
            case _:
                return self._convert_number(written.strip())

    def _convert_number(self, written: str) -> Json:
        if not written:
            return None
        number = float(written) if NUMBER_PATTERN.fullmatch(written) else math.nan
        if not math.isfinite(number):
            raise _invalid_workbook("a cell has an invalid number")
        if self._shows is not NumberDisplay.NUMBER:
            return _format_serial(number, self._shows, counts_from_1904=self._counts_from_1904)
        return _simplify_number(number)


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_whole(written: str | None, otherwise: int = 0) -> int:
    return int(written) if written and WHOLE_PATTERN.fullmatch(written) else otherwise


def _column_number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number


def _simplify_number(number: float) -> int | float:
    return int(number) if number.is_integer() and abs(number) < MAXIMUM_EXACT else number


def _unescape(text: str) -> str:
    """Return a text with escapes such as `_x000D_` replaced by their characters, unless JSON can't contain these."""
    return ESCAPE_PATTERN.sub(_unescape_character, text) if "_x" in text else text


def _unescape_character(escape: re.Match[str]) -> str:
    code = int(escape.group(1), 16)
    is_half_a_pair = 0xD800 <= code <= 0xDFFF  # noqa: PLR2004 - range of surrogates, which are no characters
    return escape.group() if code == 0 or is_half_a_pair else chr(code)


def _display_of_format(code: str) -> NumberDisplay:
    """Return the kind of value that an Excel number format displays: date, time, both or a number, by its
    first section.
    """
    letters = LITERAL_PARTS.sub("", code[:1_000].lower()).partition(";")[0]
    if ELAPSED_PATTERN.search(letters):
        return NumberDisplay.NUMBER
    has_time = "h" in letters or "s" in letters
    has_date = "y" in letters or "d" in letters or ("m" in letters and not has_time)
    if has_date and letters.strip() != "general":
        return NumberDisplay.MOMENT if has_time else NumberDisplay.DATE
    return NumberDisplay.TIME if has_time else NumberDisplay.NUMBER


def _format_serial(serial: float, shows: NumberDisplay, *, counts_from_1904: bool) -> Json:
    """Return the ISO date, time or both, as `shows` says, of an Excel serial number of days; the number itself if it is
    out of range.

    A date with a part of a day, and a time of a day or more, become date and time.
    """
    if not 0 <= serial < MAX_DAYS:
        return _simplify_number(serial)
    milliseconds = round(serial * DAY_MILLISECONDS)
    moment = _epoch_day(serial, counts_from_1904=counts_from_1904) + timedelta(milliseconds=milliseconds)
    if shows is NumberDisplay.TIME and serial < 1:
        return moment.time().isoformat()
    if shows is NumberDisplay.DATE and milliseconds % DAY_MILLISECONDS == 0:
        return moment.date().isoformat()
    return moment.isoformat()


def _epoch_day(serial: float, *, counts_from_1904: bool) -> datetime:
    if counts_from_1904:
        return datetime(1904, 1, 1)  # noqa: DTZ001 - dates in a sheet have no zone
    # Excel counts a 29th of February 1900: earlier days have a smaller number.
    return datetime(1899, 12, 31 if serial < DAYS_TO_LEAP_DAY else 30)  # noqa: DTZ001 - dates in a sheet have no zone
