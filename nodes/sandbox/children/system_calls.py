"""Filters of system calls (seccomp), which the kernel enforces on a process for good.

Refused calls fail with `EPERM`. Only Linux has such filters, and call numbers differ between architectures: without
them there is no filter.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from errno import EFAULT, EPERM
from typing import Final, TypeAlias

CallNumbers: TypeAlias = Mapping[str, tuple[int | None, int | None]]

MACHINES: Final[Mapping[str, tuple[int, int]]] = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
"""Column of the call numbers and audit constant of each supported architecture."""

COMPUTING_CALLS: Final[CallNumbers] = {
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
"""Calls that computing needs, with pipes that are already open: no files, network, processes or threads."""

REACHING_OUT_CALLS: Final[CallNumbers] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsopen": (430, 430),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "migrate_pages": (256, 238),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
"""Calls that reach a network, other processes, or rarely used parts of the kernel."""

CHANGING_ACCESS_CALLS: Final[CallNumbers] = {
    "chmod": (90, None),
    "chown": (92, None),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchownat": (260, 54),
    "lchown": (94, None),
    "link": (86, None),
    "linkat": (265, 37),
    "lsetxattr": (189, 6),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "setxattr": (188, 5),
    "symlink": (88, None),
    "symlinkat": (266, 36),
}
"""Calls that change owners, permissions or names of files by path; Landlock covers only a part of them."""

CHANGING_FILES_CALLS: Final[CallNumbers] = {
    **CHANGING_ACCESS_CALLS,
    "creat": (85, None),
    "fallocate": (285, 47),
    "fchmod": (91, 52),
    "fchown": (93, 55),
    "fremovexattr": (199, 16),
    "fsetxattr": (190, 7),
    "ftruncate": (77, 46),
    "futimesat": (261, None),
    "lremovexattr": (198, 15),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "openat2": (437, 437),
    "removexattr": (197, 14),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "rmdir": (84, None),
    "truncate": (76, 45),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
}
"""Calls that change files and folders, except opening a file for writing."""

STARTING_PROCESSES_CALLS: Final[CallNumbers] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
}
"""Calls that start processes and threads, and run programs."""

OPENING_CALLS: Final[CallNumbers] = {"open": (2, None), "openat": (257, 56)}
FLAGS_PLACE: Final[Mapping[str, int]] = {"open": 1, "openat": 2}
"""Index of the argument with the flags of opening."""
FOR_CHANGE: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

SET_FILTER: Final = (22, 2)
LOAD_WORD: Final = 0x20
JUMP_IF_EQUAL: Final = 0x15
JUMP_IF_AT_LEAST: Final = 0x35
JUMP_IF_SOME_BITS: Final = 0x45
RETURN: Final = 0x06
NUMBER_OFFSET: Final = 0
MACHINE_OFFSET: Final = 4
ARGUMENTS_OFFSET: Final = 16
ARGUMENT_BYTES: Final = 8
"""The lower half comes first, on both architectures."""
KILL: Final = 0x8000_0000
REFUSE: Final = 0x0005_0000 | EPERM
ALLOW: Final = 0x7FFF_0000
OTHER_TABLE: Final = 0x4000_0000
"""Start of the x32 numbers, by which x86-64 offers the same calls again."""


def allow_calls(calls: CallNumbers) -> bool:
    """Refuse all system calls except these with EPERM from now on; return False if the system can't filter them."""
    return _install_filter(calls, named=ALLOW, others=REFUSE)


def refuse_calls(calls: CallNumbers) -> bool:
    """Refuse these system calls with EPERM from now on; return False if the system can't filter them."""
    return _install_filter(calls, named=REFUSE, others=ALLOW)


def refuse_changes(calls: CallNumbers) -> bool:
    """Refuse these system calls, and all that change files or open them for a change, with EPERM from now on.

    Returns False if the system can't filter calls.
    """
    return _install_filter({**calls, **CHANGING_FILES_CALLS}, named=REFUSE, others=ALLOW, read_only=True)


def is_seccomp_available() -> bool:
    """Return whether system calls can be filtered: the kernel has seccomp and lets this container use it, and
    `MACHINES` has the architecture.
    """
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        return False
    # A null filter fails with EFAULT if filters are supported, and with EINVAL if not.
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(*SET_FILTER, None, 0, 0) != 0 and ctypes.get_errno() == EFAULT)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install_filter(calls: CallNumbers, *, named: int, others: int, read_only: bool = False) -> bool:
    """Install a filter of system calls: `named` is the verdict for `calls`, `others` for the rest; return whether it is
    active.

    With `read_only`, opening a file for a change is refused too. Raises `OSError` if the system supports filters and
    refuses this filter.
    """
    machine = MACHINES.get(os.uname().machine)
    if sys.platform != "linux" or machine is None:
        return False
    column, mark = machine
    numbers = [each[column] for each in calls.values()]
    checks = _build_open_checks(column) if read_only else []
    code = _build_filter(mark, [number for number in numbers if number is not None], named, others, checks)
    program = _FilterProgram(len(code), b"".join(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*SET_FILTER, ctypes.byref(program), 0, 0) == 0:
        return True
    if is_seccomp_available():
        # No job may run behind a barrier that only seems to exist.
        raise OSError(ctypes.get_errno(), "seccomp refused")
    return False


def _build_open_checks(column: int) -> list[bytes]:
    """Return the instructions that refuse to open a file for change, and allow to open it otherwise.

    `column` is that of the architecture in the table of numbers.
    """
    checks: list[bytes] = []
    for name, numbers in OPENING_CALLS.items():
        number = numbers[column]
        if number is not None:
            flags = ARGUMENTS_OFFSET + ARGUMENT_BYTES * FLAGS_PLACE[name]
            checks += [
                _build_instruction(JUMP_IF_EQUAL, number, if_not=4),
                _build_instruction(LOAD_WORD, flags),
                _build_instruction(JUMP_IF_SOME_BITS, FOR_CHANGE, if_not=1),
                _build_instruction(RETURN, REFUSE),
                _build_instruction(RETURN, ALLOW),
            ]
    return checks


def _build_filter(
    mark: int, numbers: Sequence[int], named: int, others: int, checks: Sequence[bytes]
) -> list[bytes]:
    """Return the filter program: a call of another architecture kills the process, those in `numbers` get the verdict
    `named`, and the rest `others`.

    `mark` is the audit constant of the architecture. `checks` are instructions that come before these verdicts.
    """
    jumps = [
        _build_instruction(JUMP_IF_EQUAL, number, if_so=len(numbers) - place)
        for place, number in enumerate(numbers)
    ]
    return [
        _build_instruction(LOAD_WORD, MACHINE_OFFSET),
        _build_instruction(JUMP_IF_EQUAL, mark, if_so=1),
        _build_instruction(RETURN, KILL),
        _build_instruction(LOAD_WORD, NUMBER_OFFSET),
        _build_instruction(JUMP_IF_AT_LEAST, OTHER_TABLE, if_not=1),
        _build_instruction(RETURN, REFUSE),
        *checks,
        *jumps,
        _build_instruction(RETURN, others),
        _build_instruction(RETURN, named),
    ]


def _build_instruction(code: int, operand: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_so, if_not, operand)
