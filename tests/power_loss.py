"""Replay of a process's file operations as a power cut may leave them; `file_recorder.c` records them.

The rules are the worst case of POSIX. Written data is durable once its file was synced; names are durable
once their folder was. Until then any part of it may exist, in any order, and writes may be torn at a sector.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

RECORDER = Path(__file__).with_name("file_recorder.c")
SECTOR_BYTES = 512
_HEADER = struct.Struct("=cIIQ")

Survives: TypeAlias = Callable[[], bool]
"""Decides for each unsynced change, and each sector of it, whether it survives the power cut."""


@dataclass(frozen=True, slots=True)
class FileOperation:
    """One change of a file, or one sync."""

    kind: str
    path: str
    data: bytes
    offset: int
    ends_at: int
    """End offset of its record in the log."""


def recorder_environment(library: Path, root: Path, log: Path) -> dict[str, str]:
    """Return the environment variables that make the recorder record a process."""
    return {"LD_PRELOAD": str(library), "FILE_RECORDER_ROOT": str(root), "FILE_RECORDER_LOG": str(log)}


def read_operations(log: Path) -> Iterator[FileOperation]:
    """Yield the recorded operations in order."""
    content, at = log.read_bytes(), 0
    while at < len(content):
        kind, path_length, size, offset = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        path = content[at : at + path_length].decode()
        at += path_length
        data = content[at : at + size]
        at += size
        yield FileOperation(kind.decode(), path, data, offset, at)


@dataclass(eq=False)
class FileNode:
    """File: its durable content, and the changes since its last sync."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Offset and data; or a new size, and None."""

    def sync(self) -> None:
        """Make all changes of the file durable."""
        self.durable = self.content(lambda: True)
        self.pending.clear()

    def content(self, survives: Survives) -> bytearray:
        """Return the content that a power cut leaves: the durable part, and the
        sectors for which `survives` returns True.
        """
        content = bytearray(self.durable)
        for offset, data in self.pending:
            if data is None:
                if survives():
                    _resize(content, offset)
                continue
            for start in range(0, len(data), SECTOR_BYTES):
                if survives():
                    sector = data[start : start + SECTOR_BYTES]
                    _resize(content, max(len(content), offset + start + len(sector)))
                    content[offset + start : offset + start + len(sector)] = sector
        return content


@dataclass(eq=False)
class FolderNode:
    """Folder: its durable names, its present names, and the changes since its last sync."""

    durable: dict[str, FileNode | FolderNode] = field(default_factory=dict)
    names: dict[str, FileNode | FolderNode] = field(default_factory=dict)
    pending: list[dict[str, FileNode | FolderNode | None]] = field(default_factory=list)
    """Atomic changes that are not yet durable; None marks a removed name."""

    def change(self, names: dict[str, FileNode | FolderNode | None]) -> None:
        """Add, replace and (None) remove names in one atomic change, which is not yet durable."""
        self.pending.append(names)
        _apply(self.names, names)

    def sync(self) -> None:
        """Make all changes of the folder's names durable."""
        self.durable = dict(self.names)
        self.pending.clear()

    def entries(self, survives: Survives) -> dict[str, FileNode | FolderNode]:
        """Return the names that a power cut leaves: the durable ones, with the
        changes for which `survives` returns True.
        """
        names = dict(self.durable)
        for change in self.pending:
            if survives():
                _apply(names, change)
        return names


class SimulatedDisk:
    """Folder on a disk that may lose power, with its files and folders; the folder itself always exists."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.top = FolderNode()

    def apply(self, operation: FileOperation) -> None:
        """Apply one recorded operation of a process to the simulated files; those of deleted files are ignored."""
        if operation.path.endswith(" (deleted)"):
            return
        folder, name = self._place(operation.path)
        node = folder.names.get(name) if name else folder
        match operation.kind:
            case "C" if node is None:
                folder.change({name: FileNode()})
            case "M":
                folder.change({name: FolderNode()})
            case "W" if isinstance(node, FileNode):
                node.pending.append((operation.offset, operation.data))
            case "T" if isinstance(node, FileNode):
                node.pending.append((operation.offset, None))
            case "S" if node is not None:
                node.sync()
            case "U":
                folder.change({name: None})
            case "R" | "L":
                assert node is not None, operation
                self._rename(folder, name, node, operation)

    def write_out(self, target: Path, survives: Survives) -> None:
        """Write the state after a power cut into an empty real folder; `survives`
        decides about each unsynced change.
        """
        _write_out(self.top, target, survives)

    def _rename(
        self, folder: FolderNode, name: str, node: FileNode | FolderNode, operation: FileOperation
    ) -> None:
        to, new_name = self._place(operation.data.decode())
        gone: dict[str, FileNode | FolderNode | None] = {name: None} if operation.kind == "R" else {}
        if to is folder:
            folder.change({**gone, new_name: node})
        else:
            to.change({new_name: node})
            folder.change(gone)

    def _place(self, path: str) -> tuple[FolderNode, str]:
        """Return the parent folder of a path, and its name in it; an empty name for the root itself."""
        parts = [part for part in path.removeprefix(self._root).split("/") if part and part != "."]
        folder = self.top
        for part in parts[:-1]:
            inner = folder.names[part]
            assert isinstance(inner, FolderNode), path
            folder = inner
        return folder, parts[-1] if parts else ""


def keep_nothing() -> bool:
    """Return False: no unsynced change survives the power cut."""
    return False


def keep_some(seed: int) -> Survives:
    """Return a function that lets a random share of the unsynced changes survive, large or small by `seed`."""
    chance = random.Random(seed)
    share = chance.random()
    return lambda: chance.random() < share


def _apply(names: dict[str, FileNode | FolderNode], change: dict[str, FileNode | FolderNode | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _write_out(folder: FolderNode, target: Path, survives: Survives) -> None:
    for name, node in folder.entries(survives).items():
        if isinstance(node, FolderNode):
            (target / name).mkdir(mode=0o700)
            _write_out(node, target / name, survives)
        else:
            (target / name).write_bytes(node.content(survives))
