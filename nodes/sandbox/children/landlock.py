"""Landlock (Linux 5.13 and later): permanently drops access to files, TCP, and signals to other processes.

Numbers and structures are those of `linux/landlock.h`; a kernel with a lower ABI gets the rights that it knows.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Mapping
from functools import cache
from typing import Final

CREATE_RULESET: Final = 444
ADD_RULE: Final = 445
RESTRICT_SELF: Final = 446
"""Numbers of the system calls, the same on x86-64 and ARM."""
ASK_VERSION: Final = 1
RULE_PATH_BENEATH: Final = 1
SET_NO_NEW_PRIVILEGES: Final = 38

EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
REMOVE_FILE: Final = 1 << 5
MAKE_DIR: Final = 1 << 7
MAKE_REG: Final = 1 << 8
TRUNCATE: Final = 1 << 14

READ_RIGHTS: Final = READ_FILE | READ_DIR
RUN_RIGHTS: Final = EXECUTE | READ_FILE
CHANGE_RIGHTS: Final = READ_RIGHTS | WRITE_FILE | REMOVE_FILE | MAKE_DIR | MAKE_REG | TRUNCATE
FILE_ONLY_RIGHTS: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
"""Rights that are valid in a rule for a single file."""

FILE_RIGHTS: Final[Mapping[int, int]] = {
    1: (1 << 13) - 1,
    2: (1 << 14) - 1,
    3: (1 << 15) - 1,
    5: (1 << 16) - 1,
}
"""All file rights, by the ABI that introduced them."""
TCP_RIGHTS: Final = 0b11
TCP_ABI: Final = 4
SIGNALS_AND_ABSTRACT_SOCKETS: Final = 0b11
SCOPE_ABI: Final = 6


@cache
def landlock_version() -> int:
    """Return the version of the kernel's Landlock interface; 0 if Landlock is missing or disabled."""
    if sys.platform != "linux":
        return 0
    return max(0, _system_call(CREATE_RULESET, None, 0, ASK_VERSION))


def restrict_files(allowed: Mapping[str, int]) -> bool:
    """Restrict this process for good: no file access except the given rights below the given paths, no TCP, and no
    signals or abstract sockets to other processes.

    Access that the kernel's version of Landlock can't restrict stays. Returns False without Landlock, and raises
    `OSError` if it refuses: no job may run behind a barrier that only seems to exist. Missing paths are left out; open
    files stay open.
    """
    abi = landlock_version()
    if abi == 0:
        return False
    rights = max(each for least, each in FILE_RIGHTS.items() if least <= abi)
    attributes = struct.pack(
        "=QQQ",
        rights,
        TCP_RIGHTS if abi >= TCP_ABI else 0,
        SIGNALS_AND_ABSTRACT_SOCKETS if abi >= SCOPE_ABI else 0,
    )
    size = 8 if abi < TCP_ABI else 16 if abi < SCOPE_ABI else 24
    ruleset = _system_call(CREATE_RULESET, attributes, size, 0)
    _require_success(ruleset >= 0)
    try:
        for path, wanted in allowed.items():
            _allow_path(ruleset, path, wanted & rights)
        _load_libc().prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        _require_success(_system_call(RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)
    return True


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    """Add rights below a path, or to a single file, to a ruleset; a missing path is skipped."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        rule = struct.pack("=Qi", rights if is_folder else rights & FILE_ONLY_RIGHTS, descriptor)
        _require_success(_system_call(ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0) == 0)
    finally:
        os.close(descriptor)


def _require_success(is_done: bool) -> None:  # noqa: FBT001 - it reads as a sentence
    if not is_done:
        raise OSError(ctypes.get_errno(), "Landlock refused")


def _system_call(number: int, *arguments: bytes | int | None) -> int:
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return int(_load_libc().syscall(ctypes.c_long(number), *words))


@cache
def _load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
