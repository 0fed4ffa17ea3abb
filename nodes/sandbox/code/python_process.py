"""Execution of user code in CPython: in its own process, which the kernel restricts to computing.

No barrier within Python would hold such code, so all barriers surround the process. It can reach no file, no network
and no other process, so standard modules that aren't loaded beforehand can't be imported.
"""

from __future__ import annotations

import ast
import gc
import io
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from engine.run_errors import NodeError
from json_text import decoding
from nodes.sandbox.children import confinement, landlock, system_calls
from nodes.sandbox.code import script_output
from nodes.sandbox.code.script_output import PrintedLines
from nodes.sandbox.frames import CodeJob

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sandbox.children.child import JobReporter, PerformJob

MEMORY_BYTES: Final = 2 << 30
"""Memory limit until the job sets its own."""
OPEN_FILES: Final = 16
CODE_FILE: Final = "<code>"
RETURN_FUNCTION: Final = "__return__"
ALLOWED_MODULES: Final = (
    "abc",
    "array",
    "ast",
    "base64",
    "binascii",
    "bisect",
    "calendar",
    "cmath",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "enum",
    "fractions",
    "functools",
    "graphlib",
    "hashlib",
    "heapq",
    "hmac",
    "html",
    "html.entities",
    "html.parser",
    "io",
    "ipaddress",
    "itertools",
    "json",
    "keyword",
    "math",
    "numbers",
    "operator",
    "os",
    "pprint",
    "queue",
    "random",
    "re",
    "secrets",
    "statistics",
    "string",
    "struct",
    "sys",
    "textwrap",
    "time",
    "timeit",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "urllib.parse",
    "uuid",
    "warnings",
    "weakref",
    "xml.etree.ElementTree",
    "zlib",
)

_decode = decoding.build_decoder(CodeJob).decode


def load() -> PerformJob:
    for module in ALLOWED_MODULES:
        import_module(module)
    return perform


def confine(parent: int) -> None:
    confinement.limit_process(memory_bytes=MEMORY_BYTES, open_files=OPEN_FILES)
    confinement.limit_processes(0)
    confinement.leave_network()
    confinement.switch_user()
    confinement.give_up_rights()
    confinement.die_with_parent(parent)
    landlock.restrict_files({})


def perform(raw: bytes, reporter: JobReporter) -> Json:
    """Run the script of an encoded `CodeJob` and return its result as JSON; printed lines go to the reporter.

    It restricts this process for good, which performs no other job. Raises `NodeError`.
    """
    job = _decode(raw)
    names = decoding.decode(job.inputs)
    printed = PrintedLines(reporter)
    confinement.limit_cpu(job.timeout_seconds)
    confinement.limit_memory(job.max_memory_bytes)
    if not system_calls.allow_calls(system_calls.COMPUTING_CALLS):
        message = "This server can't run CPython: its kernel does not support filters of system calls"
        raise NodeError(message, code="not-available")
    sys.stdin, sys.stdout, sys.stderr = (
        io.StringIO(),
        ScriptStream(printed, "stdout"),
        ScriptStream(printed, "stderr"),
    )
    try:
        value = _run_script(job.source, names)
    except MemoryError as error:
        _free_frames(error)
        raise script_output.script_out_of_memory(job.max_memory_bytes) from None
    except BaseException as error:  # noqa: BLE001 - it is the user's code
        raise _translate_error(error) from None
    finally:
        with suppress(MemoryError):
            printed.end()
    return script_output.encode_result(value)


class ScriptStream(io.TextIOBase):
    """Output stream of a script."""

    def __init__(self, printed: PrintedLines, name: str) -> None:
        self._printed = printed
        self._name = name

    def write(self, text: str) -> int:
        self._printed.write(self._name, text)
        return len(text)


class ScriptReturn(BaseException):
    """Control flow of a `return` outside of functions."""

    def __init__(self, value: object) -> None:
        self.value = value


def _run_script(source: str, names: Mapping[str, Json]) -> object:
    """Run a Python script; return the value of its last statement if that is an expression, or of a `return` outside
    of functions, else None.

    `names` are its global variables. Raises the exceptions of the script, and `SyntaxError`.
    """
    body, last = _compile_script(source)
    scope: dict[str, Any] = {"__name__": "__main__", RETURN_FUNCTION: ScriptReturn, **names}
    try:
        exec(body, scope)  # noqa: S102 - the purpose of the process
        return None if last is None else eval(last, scope)  # noqa: S307 - the purpose of the process
    except ScriptReturn as returned:
        return returned.value


def _compile_script(source: str) -> tuple[CodeType, CodeType | None]:
    """Return the compiled script without its last statement if that is an expression, and this expression; else all and
    None.

    Each `return` outside of functions raises `ScriptReturn`.
    """
    tree = ast.fix_missing_locations(_ReturnTransformer().visit(ast.parse(source, CODE_FILE)))
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        return compile(tree, CODE_FILE, "exec"), None
    tree.body.pop()
    return compile(tree, CODE_FILE, "exec"), compile(ast.Expression(last.value), CODE_FILE, "eval")


class _ReturnTransformer(ast.NodeTransformer):
    """Converts each `return` outside of functions to a `raise`."""

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        value = node.value or ast.Constant(None)
        call = ast.Call(ast.Name(RETURN_FUNCTION, ast.Load()), [value], [])
        return ast.copy_location(ast.Raise(call), node)

    def _left_alone(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = _left_alone  # noqa: N815 - names of ast


def _free_frames(error: BaseException) -> None:
    """Free the objects that the frames of a failed script hold, so that its lack of memory can be reported."""
    error.__traceback__ = None
    gc.collect()


def _translate_error(error: BaseException) -> NodeError:
    """Return the `NodeError` for an exception of the code or its parser, with its type, message and line.

    The message is empty if the exception's own `__str__` fails.
    """
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return script_output.code_error(kind, error.msg, error.lineno)
    try:
        message = str(error)
    except BaseException:  # noqa: BLE001 - it is the user's code
        message = ""
    return script_output.code_error(kind, message, _last_script_line(error.__traceback__))


def _last_script_line(traceback: TracebackType | None) -> int | None:
    """Return the line number in the innermost frame of the script in a traceback; None if no frame is of the script."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == CODE_FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
