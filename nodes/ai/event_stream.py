"""Parser of event streams (`text/event-stream`), fed with pieces that end anywhere."""

from __future__ import annotations

from typing import Final

MAX_EVENT_BYTES: Final = 4_000_000


class EventTooLarge(ValueError):
    """Event above the maximum size."""


class EventStreamParser:
    """Parser that keeps the incomplete rest of a stream between two pieces.

    Lines end with LF, CR LF or CR. Names, ids and comments are ignored: providers repeat the name of an event
    in its data.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Add the next piece of the stream, and return the data of the events that end in it; empty if none does.

        Lines may be split between pieces. Raises `EventTooLarge` for an event or a line of over 4 MB.
        """
        self._rest += piece
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLarge
        *lines, rest = bytes(self._rest).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if self._rest.endswith(b"\r"):
            # Its `\n` may come with the next piece.
            lines, rest = lines[:-1] if lines else lines, (lines[-1] if lines else b"") + b"\r"
        self._rest = bytearray(rest)
        return [data for line in lines if (data := self._take_line(line)) is not None]

    def finish(self) -> list[bytes]:
        """Return the data of a last event that no empty line ends, as some servers send it; empty if there is none."""
        found = self.feed(b"\n\n") if self._rest or self._data else []
        self._rest.clear()
        return found

    def _take_line(self, line: bytes) -> bytes | None:
        """Add a line to the current event; an empty line ends the event, and its data is returned, else None.

        Raises `EventTooLarge` for an event of over 4 MB.
        """
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._data_bytes += len(value)
                if self._data_bytes > MAX_EVENT_BYTES:
                    raise EventTooLarge
            return None
        if not self._data:
            return None
        data = b"\n".join(self._data)
        self._data, self._data_bytes = [], 0
        return data
