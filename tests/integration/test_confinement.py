"""Walls of child processes: each attack is tried from within, with Landlock and, as on older kernels, without."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nodes.sandbox.children import landlock, system_calls
from nodes.sandbox.code.code_backend import CodeBackend
from nodes.sandbox.code.code_runner import CodeRunner
from tests.node_calls import CALLER

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not system_calls.is_seccomp_available(), reason="only Linux has such walls"),
]

ROOT = Path(__file__).parents[2]
PLAIN_USER = 10_001
KINDS = {
    "monty": "nodes.sandbox.code.monty_process",
    "python": "nodes.sandbox.code.python_process",
    "library": "nodes.sandbox.children.library_jobs",
    "forms": "nodes.sandbox.children.form_jobs",
    "sqlite": "nodes.connections.sqlite_process",
}
WORKER = """
import os, subprocess, sys
from nodes.sandbox.children import confinement
os.environ["CANARY"] = "secret"
confinement.hide_process()
_, work, has_landlock, folder, attacks = sys.argv
arguments = [sys.executable, "-c", attacks, work, has_landlock, str(os.getpid()), folder]
environment = {"SQLITE_TMPDIR": folder + "/allowed"}
child = subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, start_new_session=True)
sys.exit(child.wait())
"""
"""Starts like a worker, but the child tries forbidden operations."""
ATTACKS = """
import ctypes, importlib, json, os, socket, sys
sys.path = [entry or os.getcwd() for entry in sys.path]
_, work, has_landlock, worker, folder = sys.argv
from nodes.sandbox.children import landlock, system_calls
if has_landlock == "no":
    landlock.restrict_files = lambda allowed: False
module = importlib.import_module(work)
module.load()
libc = ctypes.CDLL(None, use_errno=True)

def called(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def forked():
    if os.fork() == 0:
        os._exit(0)

def ran():
    if os.fork() == 0:
        try:
            os.execv("/bin/true", ["true"])
        except OSError:
            os._exit(13)
    if os.waitstatus_to_exitcode(os.wait()[1]) == 13:
        raise OSError("refused")

attacks = {
    "environment": lambda: os.read(os.open(f"/proc/{worker}/environ", os.O_RDONLY), 100),
    "memory of the worker": lambda: os.open(f"/proc/{worker}/mem", os.O_RDWR),
    "descriptors of the worker": lambda: os.listdir(f"/proc/{worker}/fd"),
    "read": lambda: os.open(f"{folder}/victim", os.O_RDONLY),
    "list": lambda: os.listdir(folder),
    "write": lambda: os.open(f"{folder}/victim", os.O_WRONLY),
    "truncate": lambda: os.open(f"{folder}/victim", os.O_RDONLY | os.O_TRUNC),
    "create": lambda: os.open(f"{folder}/new", os.O_WRONLY | os.O_CREAT),
    "delete": lambda: os.unlink(f"{folder}/victim"),
    "rename": lambda: os.rename(f"{folder}/victim", f"{folder}/new"),
    "link": lambda: os.link(f"{folder}/victim", f"{folder}/new"),
    "symlink": lambda: os.symlink("victim", f"{folder}/new"),
    "folder": lambda: os.mkdir(f"{folder}/new"),
    "mode": lambda: os.chmod(f"{folder}/victim", 0o777),
    "run": ran,
    "fork": forked,
    "network": lambda: socket.socket(socket.AF_INET),
    "local socket": lambda: socket.socket(socket.AF_UNIX),
    "trace": lambda: called(libc.ptrace(16, int(worker), 0, 0)),
    "signal": lambda: os.kill(int(worker), 0),
    "take memory": lambda: bytearray(4 << 30),
    "namespace": lambda: called(libc.unshare(0x10000000)),
    "shared memory": lambda: called(libc.shmget(0, 4096, 0o600)),
}
module.confine(os.getppid())
if work.endswith("python_process"):
    system_calls.allow_calls(system_calls.COMPUTING_CALLS)
succeeded = []
for name, attack in attacks.items():
    try:
        attack()
        succeeded.append(name)
    except (OSError, MemoryError):
        pass
os.write(1, json.dumps(succeeded).encode())
os._exit(0)
"""

HELD_BY_LANDLOCK = {
    "monty": {"read", "list", "run", "fork", "signal"},
    "sqlite": {"read", "list", "write", "truncate", "create", "delete", "rename", "folder", "signal"},
}
"""Kinds of system calls that such a process needs, and that a filter without paths must permit."""
NEEDED = {"monty": {"fork"}}
"""It starts its interpreter, which may start no process: see below."""


def _plain_user() -> int | None:
    """Return an unprivileged user to run as; None if the tests run as one, or it could not read the code."""
    here = (Path(sys.executable).resolve(), Path(sys.executable), ROOT / "nodes")
    folders = {folder for path in here for folder in path.parents}
    is_for_all = all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)
    return PLAIN_USER if os.geteuid() == 0 and is_for_all else None


@pytest.mark.parametrize("has_landlock", [True, False], ids=["landlock", "older kernel"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_child_process_reaches_nothing(kind: str, tmp_path: Path, *, has_landlock: bool) -> None:
    if has_landlock and not landlock.landlock_version():
        pytest.skip("the kernel has no Landlock")
    user = _plain_user()
    folder = tmp_path
    (folder / "allowed").mkdir()
    (folder / "victim").write_text("kept")
    if user is not None:
        for path in (folder, *folder.iterdir()):
            os.chown(path, user, user)
        for path in list(folder.parents)[:3]:
            path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, KINDS[kind], "yes" if has_landlock else "no", str(folder), ATTACKS],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
        user=user,
        group=user,
        extra_groups=[] if user is not None else None,
    )
    assert done.returncode == 0, done.stderr.decode()
    succeeded = set(json.loads(done.stdout)) - NEEDED.get(kind, set())
    if not has_landlock:
        succeeded -= HELD_BY_LANDLOCK.get(kind, set())
        if os.geteuid() == 0 and user is None:
            succeeded -= {"environment", "memory of the worker", "descriptors of the worker"}
    assert succeeded == set()
    assert has_landlock is False or (folder / "victim").read_text() == "kept"


def test_a_server_hides_its_environment_from_other_processes_of_its_user() -> None:
    get_dumpable = 3
    program = f"""
import ctypes
from models.settings import ServerSettings
from pilotflame import server_processes
server_processes.begin(ServerSettings())
print(ctypes.CDLL(None).prctl({get_dumpable}, 0, 0, 0, 0))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, timeout=60
    )
    assert done.stdout == b"0\n"


async def test_the_interpreter_of_code_can_start_no_process() -> None:
    before = interpreters()  # those of other tests that are about to end
    runner = CodeRunner(CodeBackend.MONTY, limit=1)
    try:
        for _ in range(3):
            output = await runner.run(
                CALLER, "1 + 1", {}, timeout_seconds=5, max_memory_bytes=1 << 26, print_line=lambda *_: None
            )
            assert output == 2
        (interpreter,) = interpreters() - before
        assert max_processes(interpreter) == ["0", "0"]
    finally:
        await runner.close()


def interpreters() -> set[psutil.Process]:
    """Return the interpreters of code below this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "monty":
                found.add(process)
    return found


def max_processes(process: psutil.Process) -> list[str]:
    """Return the soft and the hard limit, which are readable by all."""
    limits = Path(f"/proc/{process.pid}/limits").read_text(encoding="ascii")
    return next(line.split()[2:4] for line in limits.splitlines() if line.startswith("Max processes"))
