"""Paths into the data of a run, and templates: compiled once, rendered often, never executed as code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from functools import lru_cache
from typing import Final, TypeAlias

from msgspec import Struct

from concurrency import offload
from engine.operations import OPERATIONS, ExpressionOperation, OperationError
from engine.values import MAX_DEPTH, InvalidJson, Json, count_values, decode_json, value_as_text

ExpressionScope: TypeAlias = Mapping[str, Json]
"""Values by root; see `ROOTS`."""

ROOTS: Final = ("data", "trigger", "nodes", "item", "index", "execution", "approval", "args")
MAX_PATH_LENGTH: Final = 1_000
MAX_PATH_STEPS: Final = 50
MAX_ALTERNATIVES: Final = 20
"""Maximum number of paths that one expression joins by `??`."""
MAX_OPERATIONS: Final = 1_000
MAX_WRITTEN: Final = 10_000_000
"""Maximum number of characters of text and elements of lists that one rendering may produce."""
INLINE_WRITTEN: Final = 200_000
"""Budget of an inline rendering: some milliseconds' work."""
READING_DISCOUNT: Final = 4
"""Divisor for the cost of input: an operation pays for its output and a fraction for its input."""
READING_ALL: Final = 4
"""Cost of visiting a nested value, in elements produced."""
KEY_SIZE: Final = 8
"""Memory of an object key, in elements of a list."""
MAX_EXCERPT_LENGTH: Final = 80
MAX_CACHED_LENGTH: Final = 200


class MissingType(Enum):
    """Type of `MISSING`, the result of an unresolved path; null is a possible value."""

    MISSING = "missing"


MISSING: Final = MissingType.MISSING


class ExpressionError(ValueError):
    """Expression that can't be compiled, or not be evaluated on this data; `expression` is the part at fault."""

    def __init__(self, expression: str, reason: str) -> None:
        super().__init__(f"{_shorten_text(expression)}: {reason}")
        self.expression = expression[:MAX_PATH_LENGTH]


# ── paths ───────────────────────────────────────────────────────────────────────────────────────────────────

_STEP = re.compile(
    r"""
      \. (?P<name> [A-Za-z0-9_-]++ )
    | \[ (?P<position> -?[0-9]{1,9} ) \]
    | \[ (?: "(?P<double> (?: [^"\\] | \\["\\] )*+ )" | '(?P<single> (?: [^'\\] | \\['\\] )*+ )' ) \]
    """,
    re.VERBOSE,
)
_POSITION = re.compile(r"[0-9]{1,9}")

PathStep: TypeAlias = tuple[str | None, int | None]
"""Key of an object or position in a list. A number after a dot is both, and applies to either."""


class ExpressionPath(Struct, frozen=True):
    """Path into a scope, such as `data.rows[0].name`."""

    text: str
    root: str
    steps: tuple[PathStep, ...]
    """Steps from the root."""

    def resolve(self, scope: ExpressionScope) -> Json | MissingType:
        """Return the value at the path in a scope; `MISSING` if there is none.

        Negative positions count from the end of a list; null is a value.
        """
        found: Json | MissingType = scope.get(self.root, MISSING)
        for key, position in self.steps:
            if type(found) is dict:
                found = found.get(key, MISSING)  # type: ignore[arg-type]  # None is no key, and finds nothing
            elif type(found) is list and position is not None and -len(found) <= position < len(found):
                found = found[position]
            else:
                return MISSING
        return found


def compile_path(text: str) -> ExpressionPath:
    """Compile a path such as `data.user.id`, `data["odd key"][0]` or `$.item.tags[-1]`.

    Raises `ExpressionError` for bad syntax, an unknown root, over 1,000 characters or over 50 steps.
    """
    source = text.strip()
    if len(source) > MAX_PATH_LENGTH:
        raise ExpressionError(source, f"a path has at most {MAX_PATH_LENGTH:,} characters")
    if not source:
        raise ExpressionError(text, "there is no path: write one such as data.user.id")
    (root, _), *steps = _parse_steps(source)
    if root not in ROOTS:
        near = f"data.{source.removeprefix('$.')}"
        raise ExpressionError(source, f"a path begins with {', '.join(ROOTS)}: did you mean {near}?")
    if len(steps) >= MAX_PATH_STEPS:
        raise ExpressionError(source, f"a path has at most {MAX_PATH_STEPS} steps")
    return ExpressionPath(source, root, tuple(steps))


def _parse_steps(source: str) -> list[PathStep]:
    dotted = "." + source.removeprefix("$.")
    steps: list[PathStep] = []
    at = 0
    while at < len(dotted):
        match = _STEP.match(dotted, at)
        if match is None:
            hint = 'names are joined by dots, other keys are written ["odd key"], positions [0]'
            raise ExpressionError(source, f"can't be parsed from {_shorten_text(dotted[at:])!r} on: {hint}")
        steps.append(_parse_step(match))
        at = match.end()
    return steps


def _parse_step(match: re.Match[str]) -> PathStep:
    if (name := match["name"]) is not None:
        return name, int(name) if _POSITION.fullmatch(name) else None
    if (position := match["position"]) is not None:
        return None, int(position)
    quoted = match["double"] if match["double"] is not None else match["single"]
    return re.sub(r"\\(.)", r"\1", quoted), None


class FallbackExpression(Struct, frozen=True):
    """Paths joined by `??`, such as `data.nick ?? data.name ?? "you"`; the first value that is not null wins."""

    paths: tuple[ExpressionPath, ...]
    otherwise: Json | MissingType
    """Value if no path has one; `MISSING` if the last path must be found."""

    @property
    def text(self) -> str:
        """Text of the last path, which must be found if there is no fallback value."""
        return self.paths[-1].text

    def resolve(self, scope: ExpressionScope) -> Json | MissingType:
        """Return the first value that is not null; without one, the fallback value, and if there is no such value
        either, the value of the last path (null or `MISSING`).
        """
        found: Json | MissingType = MISSING
        for path in self.paths:
            found = path.resolve(scope)
            if found is not MISSING and found is not None:
                return found
        return found if self.otherwise is MISSING else self.otherwise


Expression: TypeAlias = ExpressionPath | FallbackExpression
"""Content of a pair of braces, or a mapping as a whole."""

_ALTERNATIVE = re.compile(
    r"""( (?: [^"'?] | "(?: [^"\\] | \\. )*+" | '(?: [^'\\] | \\. )*+' | \?(?!\?) )*+ ) \?\?""",
    re.VERBOSE | re.DOTALL,
)
_LITERAL = re.compile(r"""["\[{0-9-] | (?: true | false | null ) \Z""", re.VERBOSE)


def compile_expression(text: str) -> Expression:
    """Compile a path, or several joined by `??`, the last of which may be a JSON value.

    Raises `ExpressionError` for an invalid path or value, or more than 20 paths.
    """
    if "??" not in text:
        return compile_path(text)
    paths: list[ExpressionPath] = []
    at = 0
    while len(paths) < MAX_ALTERNATIVES:
        rest = text[at:].strip()
        if paths and _LITERAL.match(rest):
            return FallbackExpression(tuple(paths), _parse_literal(rest))
        match = _ALTERNATIVE.match(text, at)
        if match is None:
            paths.append(compile_path(rest))
            return FallbackExpression(tuple(paths), MISSING) if len(paths) > 1 else paths[0]
        paths.append(compile_path(match[1]))
        at = match.end()
    raise ExpressionError(text.strip(), f"?? joins at most {MAX_ALTERNATIVES} paths")


def list_paths(expression: Expression) -> Sequence[ExpressionPath]:
    """Return every path of an expression, in the order of the text."""
    return (expression,) if isinstance(expression, ExpressionPath) else expression.paths


def needed_path(expression: Expression) -> ExpressionPath | None:
    """Return the path of an expression that must be found, the last one; None if it has a fallback value."""
    if isinstance(expression, ExpressionPath):
        return expression
    return expression.paths[-1] if expression.otherwise is MISSING else None


def _parse_literal(text: str) -> Json:
    if len(text) > MAX_PATH_LENGTH:
        raise ExpressionError(text, f"the value after ?? has at most {MAX_PATH_LENGTH:,} characters")
    try:
        return decode_json(text.encode())
    except (InvalidJson, UnicodeEncodeError) as error:
        raise ExpressionError(text, f"the value after ?? must be JSON: {error}") from error


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────


class OutputAllowance:
    """Remaining output budget of one rendering or one evaluation of a condition."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = offload.budget(MAX_WRITTEN, INLINE_WRITTEN)

    def spend(self, amount: int, expression: str) -> None:
        """Subtract produced characters or elements from the budget; raises `ExpressionError` when it is exceeded.

        Within `offload.try_inline` it raises `BudgetExceeded` when a much smaller budget is exceeded.
        """
        self.left -= amount
        if self.left < 0:
            offload.require_offloaded()
            raise ExpressionError(expression, f"it produces more than {MAX_WRITTEN:,} characters or elements")


_Render: TypeAlias = Callable[[ExpressionScope, list[str], OutputAllowance], Json]


class ValueTemplate(Struct, frozen=True, eq=False):
    """Compiled JSON value with expressions."""

    source: Json
    paths: tuple[ExpressionPath, ...]
    """All paths in the value, in the order of the text."""
    _render: _Render | None
    needed: tuple[ExpressionPath, ...] = ()
    """Paths without a fallback."""

    @property
    def is_static(self) -> bool:
        return self._render is None

    def render(
        self, scope: ExpressionScope, unresolved: list[str], allowance: OutputAllowance | None = None
    ) -> Json:
        """Return the value with its expressions replaced by values of `scope`.

        An unresolved path becomes null, or an empty text within a longer one, and its text is added to `unresolved`.
        `allowance` limits the size of the result together with other results; None limits it alone. Parts without
        expressions are shared by all results and must not be changed. Raises `ExpressionError` for a failing operation
        or a result that is too large, and `BudgetExceeded` within `offload.try_inline`.
        """
        if self._render is None:
            return self.source
        return self._render(scope, unresolved, allowance or OutputAllowance())


def compile_template(value: Json) -> ValueTemplate:
    """Compile the `{{ path }}` in the texts of `value` (not in its keys); raises `ExpressionError`.

    A text that is a single expression becomes the value found, of any type; in a longer text, values are
    written as text. Objects with `$op` are not computed.
    """
    return _TemplateCompiler(operations={}).compile(value)


def compile_value(value: Json) -> ValueTemplate:
    """Compile the `{{ path }}` in the texts of `value`, and operations `{"$op": name, "args": [...]}` at any depth.

    Texts are compiled as `compile_template` does. Raises `ExpressionError`.
    """
    return _TemplateCompiler(operations=OPERATIONS).compile(value)


def rewrite_expressions(value: Json, text_of: Callable[[Expression], str]) -> Json:
    """Return a value with the text inside each `{{ }}` replaced by `text_of(expression)`; keys stay as they are.

    Raises `ExpressionError` for an invalid expression: pass values that compile.
    """
    if isinstance(value, list):
        return [rewrite_expressions(item, text_of) for item in value]
    if isinstance(value, dict):
        return {key: rewrite_expressions(item, text_of) for key, item in value.items()}
    if not isinstance(value, str) or "{{" not in value:
        return value
    return "".join(
        part if isinstance(part, str) else f"{{{{ {text_of(part)} }}}}" for part in _split_text(value)
    )


def literal_template(value: Json) -> ValueTemplate:
    """Return a template that renders the value unchanged, braces included."""
    return ValueTemplate(value, (), None)


class _TemplateCompiler:
    """Compiler of one value with expressions to a function that renders it."""

    def __init__(self, operations: Mapping[str, ExpressionOperation]) -> None:
        self._operations = operations
        self._operation_count = 0
        self._paths: list[ExpressionPath] = []
        self._needed: list[ExpressionPath] = []

    def compile(self, value: Json) -> ValueTemplate:
        render = self._compile(value, depth=0)
        return ValueTemplate(value, tuple(self._paths), render, tuple(self._needed))

    def _compile(self, value: Json, depth: int) -> _Render | None:
        """Return the function that renders a value; None if it has no expressions. Raises `ExpressionError`."""
        if isinstance(value, str):
            return self._compile_text(value) if "{{" in value else None
        if not isinstance(value, list | dict):
            return None
        if depth >= MAX_DEPTH:
            raise ExpressionError("[…]", f"objects and lists nest more than {MAX_DEPTH} deep")
        if isinstance(value, list):
            return self._compile_list(value, depth + 1)
        if "$op" in value and self._operations:
            return self._compile_operation(value, depth + 1)
        return self._compile_object(value, depth + 1)

    def _compile_list(self, value: list[Json], depth: int) -> _Render | None:
        compiled = ((index, self._compile(item, depth)) for index, item in enumerate(value))
        dynamic = [(index, render) for index, render in compiled if render is not None]
        if not dynamic:
            return None
        static = value.copy()

        def render_list(scope: ExpressionScope, unresolved: list[str], allowance: OutputAllowance) -> Json:
            result = static.copy()
            for index, render in dynamic:
                result[index] = render(scope, unresolved, allowance)
            return result

        return render_list

    def _compile_object(self, value: dict[str, Json], depth: int) -> _Render | None:
        compiled = ((key, self._compile(item, depth)) for key, item in value.items())
        dynamic = [(key, render) for key, render in compiled if render is not None]
        if not dynamic:
            return None
        static = value.copy()

        def render_object(scope: ExpressionScope, unresolved: list[str], allowance: OutputAllowance) -> Json:
            result = static.copy()
            for key, render in dynamic:
                result[key] = render(scope, unresolved, allowance)
            return result

        return render_object

    def _compile_text(self, text: str) -> _Render:
        """Return the function that renders a text with expressions, and note its paths."""
        parts = _split_text(text)
        expressions = [part for part in parts if not isinstance(part, str)]
        for expression in expressions:
            self._paths += list_paths(expression)
            needed = needed_path(expression)
            self._needed += [needed] if needed else []
        if len(expressions) == 1 and all(not isinstance(part, str) or part.isspace() for part in parts):
            return _path_renderer(expressions[0])
        return _text_renderer(parts, text)

    def _compile_operation(self, value: dict[str, Json], depth: int) -> _Render:
        operation, arguments = self._parse_operation(value)
        renders = [
            self._compile(argument, depth + 1) or _constant_renderer(argument) for argument in arguments
        ]
        return (
            _coalesce_renderer(renders)
            if operation.takes_first_found
            else _operation_renderer(operation, renders)
        )

    def _parse_operation(self, value: dict[str, Json]) -> tuple[ExpressionOperation, list[Json]]:
        """Return the operation that an object with `$op` names, and its uncompiled arguments.

        Raises `ExpressionError` for an unknown operation, a wrong form or number of arguments, and for over 1,000
        operations in the compiled value.
        """
        name, arguments = value["$op"], value.get("args")
        if not isinstance(name, str) or name not in self._operations:
            near = get_close_matches(str(name)[:MAX_EXCERPT_LENGTH], self._operations)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(self._operations)}"
            )
            raise ExpressionError(f"$op {name}", f"there is no such operation: {hint}")
        operation = self._operations[name]
        if not isinstance(arguments, list) or len(value) > len(("$op", "args")):
            raise ExpressionError(f"$op {name}", f'it is written {{"$op": "{name}", "args": [...]}}')
        if not operation.takes(len(arguments)):
            raise ExpressionError(f"$op {name}", f"it takes {operation.arity}, not {len(arguments)}")
        self._operation_count += 1
        if self._operation_count > MAX_OPERATIONS:
            raise ExpressionError(f"$op {name}", f"one value has at most {MAX_OPERATIONS:,} operations")
        return operation, arguments


_EXPRESSION = re.compile(
    r"""\{\{ ( (?: [^{}"'] | "(?: [^"\\] | \\. )*+" | '(?: [^'\\] | \\. )*+' )*+ ) \}\}""",
    re.VERBOSE | re.DOTALL,
)


_BRACES = re.compile(
    r"""[^{}"']++ | "(?: [^"\\] | \\. )*+" | '(?: [^'\\] | \\. )*+' | [{}]""", re.VERBOSE | re.DOTALL
)


def _split_text(text: str) -> Sequence[str | Expression]:
    """Return the expressions of a text, compiled, and the nonempty texts between them; raises `ExpressionError`.

    Results for texts up to 200 characters, which often recur, are cached.
    """
    return _parse_text_cached(text) if len(text) <= MAX_CACHED_LENGTH else _parse_text(text)


def _parse_text(text: str) -> Sequence[str | Expression]:
    parts: list[str | Expression] = []
    at = 0
    while (opening := text.find("{{", at)) >= 0:
        match = _EXPRESSION.match(text, opening)
        end = match.end() if match else _find_end_of_braces(text, opening)
        if opening > at:
            parts.append(text[at:opening])
        parts.append(compile_expression(text[opening + 2 : end - 2]))
        at = end
    if at < len(text):
        parts.append(text[at:])
    return tuple(parts)


def _find_end_of_braces(text: str, opening: int) -> int:
    """Return the index behind the `}}` of an expression that may contain an object: `{{ data.a ?? {"b": {}} }}`.

    Raises `ExpressionError` if the braces are not closed.
    """
    depth, at = 0, opening + 2
    while depth or not text.startswith("}}", at):
        match = _BRACES.match(text, at)
        if match is None or (match[0] == "}" and not depth):
            raise ExpressionError(text[opening:], "write a path such as data.user.id between {{ and }}")
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        at = match.end()
    return at + 2


_parse_text_cached = lru_cache(maxsize=4_096)(_parse_text)


def _constant_renderer(value: Json) -> _Render:
    return lambda _scope, _unresolved, _allowance: value


def _path_renderer(path: Expression) -> _Render:
    def read(scope: ExpressionScope, unresolved: list[str], _allowance: OutputAllowance) -> Json:
        found = path.resolve(scope)
        if found is MISSING:
            unresolved.append(path.text)
            return None
        return found

    return read


def _text_renderer(parts: Sequence[str | Expression], source: str) -> _Render:
    def join(scope: ExpressionScope, unresolved: list[str], allowance: OutputAllowance) -> Json:
        texts = []
        for part in parts:
            text = part if isinstance(part, str) else _resolve_text(part, scope, unresolved)
            allowance.spend(len(text), source)
            texts.append(text)
        return "".join(texts)

    return join


def _resolve_text(path: Expression, scope: ExpressionScope, unresolved: list[str]) -> str:
    found = path.resolve(scope)
    if found is MISSING:
        unresolved.append(path.text)
        return ""
    try:
        return value_as_text(found, max_bytes=MAX_WRITTEN)
    except InvalidJson as error:
        raise ExpressionError(path.text, error.message) from error


def _coalesce_renderer(renders: list[_Render]) -> _Render:
    *attempts, last = renders

    def find(scope: ExpressionScope, unresolved: list[str], allowance: OutputAllowance) -> Json:
        for render in attempts:
            value = render(scope, [], allowance)  # a later argument covers a missing value here
            if value is not None:
                return value
        return last(scope, unresolved, allowance)

    return find


def _operation_renderer(operation: ExpressionOperation, renders: list[_Render]) -> _Render:
    expression = f"$op {operation.name}"

    def compute(scope: ExpressionScope, unresolved: list[str], allowance: OutputAllowance) -> Json:
        arguments = [render(scope, unresolved, allowance) for render in renders]
        if operation.reads_all:
            allowance.spend(sum(reading_cost(argument, allowance) for argument in arguments), expression)
        else:
            allowance.spend(sum(map(_value_size, arguments)) // READING_DISCOUNT, expression)
        try:
            result = operation.apply(arguments)
        except OperationError as error:
            raise ExpressionError(expression, str(error)) from error
        allowance.spend(_value_size(result), expression)
        return result

    return compute


def reading_cost(value: Json, allowance: OutputAllowance) -> int:
    """Return the cost of visiting all of a value, to spend from an `OutputAllowance`.

    That is the characters of a text, and 4 for each value in any other value, itself included. Values beyond the
    allowance are not counted.
    """
    return (
        len(value)
        if type(value) is str
        else READING_ALL * count_values(value, allowance.left // READING_ALL + 1)
    )


def _value_size(value: Json) -> int:
    if type(value) is str or type(value) is list:
        return len(value)
    return KEY_SIZE * len(value) if type(value) is dict else 1


def _shorten_text(text: str) -> str:
    return text if len(text) <= MAX_EXCERPT_LENGTH else text[: MAX_EXCERPT_LENGTH - 1] + "…"
