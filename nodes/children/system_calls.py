"""A filter of system calls, which the kernel holds a process to from then on.

What is refused fails with `EPERM`. Only Linux has such filters, and each kind of machine has numbers of its own for
the calls: elsewhere there is none.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from errno import EPERM
from typing import Final, TypeAlias

Numbers: TypeAlias = Mapping[str, tuple[int | None, int | None]]

MACHINES: Final[Mapping[str, tuple[int, int]]] = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
"""Which of a call's numbers is the machine's, and how a filter knows the machine."""

COMPUTING: Final[Numbers] = {
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "getpid": (39, 172),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "read": (0, 63),
    "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "sigaltstack": (131, 132),
    "time": (201, None),
    "write": (1, 64),
}
"""What computing needs, with pipes that are open already: no files, no network, no processes, no threads."""

REACHING_OUT: Final[Numbers] = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "setns": (308, 268),
    "socket": (41, 198),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
"""What reaches out to a network, to other processes, or into seldom used parts of the kernel."""

SET_FILTER: Final = (22, 2)
LOAD_WORD: Final = 0x20
JUMP_IF_EQUAL: Final = 0x15
JUMP_IF_AT_LEAST: Final = 0x35
RETURN: Final = 0x06
NUMBER_OFFSET: Final = 0
MACHINE_OFFSET: Final = 4
KILL: Final = 0x8000_0000
REFUSE: Final = 0x0005_0000 | EPERM
ALLOW: Final = 0x7FFF_0000
OTHER_TABLE: Final = 0x4000_0000
"""From here on, x86-64 has the same calls again under other numbers."""


def allow_only(calls: Numbers) -> bool:
    """Refuse every other call from now on; returns whether that is so."""
    return _install(calls, named=ALLOW, others=REFUSE)


def refuse(calls: Numbers) -> bool:
    """Refuse these calls from now on; returns whether that is so."""
    return _install(calls, named=REFUSE, others=ALLOW)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install(calls: Numbers, *, named: int, others: int) -> bool:
    machine = MACHINES.get(os.uname().machine)
    if sys.platform != "linux" or machine is None:
        return False
    column, mark = machine
    numbers = [each[column] for each in calls.values()]
    code = _code(mark, [number for number in numbers if number is not None], named, others)
    program = _Program(len(code), b"".join(code))
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(*SET_FILTER, ctypes.byref(program), 0, 0) == 0)


def _code(mark: int, numbers: Sequence[int], named: int, others: int) -> list[bytes]:
    """Return the filter: a call of another machine kills, and each of `numbers` jumps to the end."""
    jumps = [
        _instruction(JUMP_IF_EQUAL, number, if_so=len(numbers) - place)
        for place, number in enumerate(numbers)
    ]
    return [
        _instruction(LOAD_WORD, MACHINE_OFFSET),
        _instruction(JUMP_IF_EQUAL, mark, if_so=1),
        _instruction(RETURN, KILL),
        _instruction(LOAD_WORD, NUMBER_OFFSET),
        _instruction(JUMP_IF_AT_LEAST, OTHER_TABLE, if_not=1),
        _instruction(RETURN, REFUSE),
        *jumps,
        _instruction(RETURN, others),
        _instruction(RETURN, named),
    ]


def _instruction(code: int, operand: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_so, if_not, operand)
