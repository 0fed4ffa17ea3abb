"""Build context of both images as one archive: run by `make dist`.

    docker build --file deploy/Dockerfile - < dist/pilotflame-context.tar.gz

It has the files that `.dockerignore` lets in, which are those of a checkout with the built documentation.
"""

from __future__ import annotations

import gzip
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from deploy.release.audit import ROOT
from deploy.release.bill_of_materials import FOLDER

DOCKERFILES: Final = ("deploy/Dockerfile", "deploy/runner.Dockerfile")
ALLOWED: Final = "!"
CACHE: Final = "__pycache__"


def list_files() -> Iterator[Path]:
    """Yield the files of the context, each once, sorted by name."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    places = [line.removeprefix(ALLOWED) for line in lines if line.startswith(ALLOWED)]
    found = {path for place in (*places, *DOCKERFILES) for path in _list_below(ROOT / place)}
    yield from sorted(found, key=str)


def _list_below(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for path in place.rglob("*"):
        if path.is_file() and CACHE not in path.parts:
            yield path


def write_context(folder: Path) -> Path:
    """Write the archive of the build context into a folder, created if missing; return its path.

    The same files make the same bytes.
    """
    folder.mkdir(exist_ok=True)
    target = folder / "pilotflame-context.tar.gz"
    with (
        target.open("wb") as file,
        # The best compression takes twice the time for half a percent of the size.
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for path in list_files():
            archive.add(path, str(path.relative_to(ROOT)), filter=_strip_metadata)
    return target


def _strip_metadata(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Strip owner, times and other permissions than "executable" from a member of the archive; return it."""
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member


if __name__ == "__main__":
    sys.stdout.write(f"{write_context(FOLDER).relative_to(ROOT)}\n")
