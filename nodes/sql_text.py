"""SQL tokenizer that finds the placeholders and the end of a statement, for better errors before it is sent.

The databases themselves refuse a second statement and everything that a session may not do. The tokenizer never takes a
`?` inside a text, a name or a comment for a placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct

MAX_CHARACTERS: Final = 100_000
MAX_NAME_BYTES: Final = 64
"""Limit of MySQL; PostgreSQL would silently truncate a name to 63 bytes."""
MAX_NAME_PARTS: Final = 3

READING_VERBS: Final = frozenset({"SELECT", "WITH", "VALUES", "TABLE", "SHOW", "EXPLAIN", "DESCRIBE", "DESC"})
WRITING_VERBS: Final = frozenset(
    {
        "INSERT", "REPLACE", "UPDATE", "DELETE", "MERGE", "WITH", "CREATE", "ALTER", "DROP", "TRUNCATE",
    }
)  # fmt: skip


class SqlDialect(StrEnum):
    """SQL dialect; the value is the type of the data source."""

    POSTGRESQL = "postgresql"
    MYSQL = "mysql"
    SQLITE = "sqlite"


class StatementRefused(ValueError):
    """Refusal of a statement; the message says how to fix it, and quotes single words of it at most."""


class SqlStatement(Struct, frozen=True):
    """Statement, split at its placeholders."""

    parts: Sequence[str]
    """SQL before the first placeholder, between each two, and after the last."""
    verb: str

    @property
    def placeholder_count(self) -> int:
        return len(self.parts) - 1

    def with_placeholders(self, places: Sequence[str]) -> str:
        """Return the text of the statement with `places`, placeholders of a driver, in place of its own, one for each
        value.
        """
        pieces = [piece for pair in zip(self.parts, places, strict=False) for piece in pair]
        return "".join([*pieces, self.parts[-1]])


def parse_reading(text: str, dialect: SqlDialect, values: int) -> SqlStatement:
    """Return a parsed statement whose first word is that of a statement that reads.

    Raises `StatementRefused` for another or an invalid statement, and unless it has exactly `values` placeholders.
    """
    return _require_statement(parse_statement(text, dialect), READING_VERBS, "a statement that reads", values)


def parse_writing(text: str, dialect: SqlDialect, values: int) -> SqlStatement:
    """Return a parsed statement whose first word is that of a statement that writes.

    Raises `StatementRefused` for another or an invalid statement, and unless it has exactly `values` placeholders.
    """
    return _require_statement(
        parse_statement(text, dialect), WRITING_VERBS, "a statement that writes", values
    )


def _require_statement(
    statement: SqlStatement, verbs: Collection[str], wanted: str, values: int
) -> SqlStatement:
    if statement.verb not in verbs:
        shown = ", ".join(sorted(verbs))
        raise StatementRefused(f"{statement.verb[:20]} is not {wanted}: it must begin with one of {shown}")
    if statement.placeholder_count != values:
        raise StatementRefused(
            f"The statement has {statement.placeholder_count} placeholders (`?`), but `parameters` has {values} values"
        )
    return statement


def quote_name(name: str, dialect: SqlDialect) -> str:
    """Return a column name, or a part of a table name, quoted for a dialect.

    Raises `StatementRefused` for an empty name, over 64 bytes, and NUL.
    """
    if not name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
        raise StatementRefused(
            f"{name[:40]!r} is not a valid name: a name has 1 to {MAX_NAME_BYTES} bytes, without NUL"
        )
    mark = "`" if dialect is SqlDialect.MYSQL else '"'
    return f"{mark}{name.replace(mark, 2 * mark)}{mark}"


def quote_table(name: str, dialect: SqlDialect) -> str:
    """Return a table name in quotes, up to three parts at dots quoted one by one; raises `StatementRefused`."""
    parts = name.split(".")
    if len(parts) > MAX_NAME_PARTS:
        raise StatementRefused(f"{name[:40]!r} has too many parts to be the name of a table")
    return ".".join(quote_name(part, dialect) for part in parts)


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────

_COMMON_TOKENS = r"""
  | (?P<place> \? )
  | (?P<end> ; )
  | (?P<plain> (?: (?! [eE]' ) [^\W\d] [\w$]*+ | \d [\w.]*+ | [\s(),=+<>.*:!&%^~{}|@] )++ | . )
"""
# Each alternative of a text or name has a closed and an open form; an unclosed one ends the parsing.
_LEXERS: Final = {
    SqlDialect.POSTGRESQL: re.compile(
        r"""
            (?P<comment> --[^\r\n]* )
          | (?P<nested> /\* )
          | (?P<quoted> [eE]' (?: [^'\\] | \\. | '' )*+ ' | ' (?: [^'] | '' )*+ ' | " (?: [^"] | "" )*+ " )
          | (?P<dollar> \$ (?: [^\W\d] \w* )? \$ )
          | (?P<numbered> \$ \d+ )
          | (?P<operator> \?\? )
          | (?P<open> [eE]' | ['"] )
        """
        + _COMMON_TOKENS,
        re.VERBOSE | re.DOTALL,
    ),
    SqlDialect.MYSQL: re.compile(
        r"""
            (?P<executed> /\* M?[!+] )
          | (?P<comment> \# [^\n]* | -- (?= [\s\x00-\x1f] | \Z ) [^\n]* | /\* .*? \*/ )
          | (?P<quoted> ' (?: [^'\\] | \\. | '' )*+ ' | " (?: [^"\\] | \\. | "" )*+ " | ` (?: [^`] | `` )*+ ` )
          | (?P<open> ['"`] | /\* )
        """
        + _COMMON_TOKENS,
        re.VERBOSE | re.DOTALL,
    ),
    SqlDialect.SQLITE: re.compile(
        r"""
            (?P<comment> --[^\n]* | /\* .*? (?: \*/ | \Z ) )
          | (?P<quoted> ' (?: [^'] | '' )*+ ' | " (?: [^"] | "" )*+ " | ` (?: [^`] | `` )*+ ` | \[ [^]]* ] )
          | (?P<open> ['"`[] )
        """
        + _COMMON_TOKENS,
        re.VERBOSE | re.DOTALL,
    ),
}
_TOKEN_SUBSTITUTES: Final = {"comment": " ", "nested": " ", "quoted": "''", "dollar": "''"}
"""Substitutes of tokens in the search for the words of a statement."""
_FIRST_WORD: Final = re.compile(r"[^\s(;]\w*")
_INTO_FILE: Final = re.compile(r"\bINTO\s+(OUTFILE|DUMPFILE)\b", re.IGNORECASE)
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")


def parse_statement(text: str, dialect: SqlDialect) -> SqlStatement:
    """Return the only statement of a text, split at its placeholders (`?`).

    Raises `StatementRefused` for none, for several, for over 100,000 characters, and for invalid tokens.
    """
    if len(text) > MAX_CHARACTERS:
        raise StatementRefused(f"The statement has more than {MAX_CHARACTERS:,} characters")
    if "\0" in text:
        raise StatementRefused("The statement holds the character NUL")
    pieces: list[list[str]] = [[]]
    words = []
    for kind, token in _iterate_tokens(text, _LEXERS[dialect]):
        words.append(_TOKEN_SUBSTITUTES.get(kind, token))
        if kind == "place":
            pieces.append([])
        elif kind != "end":
            pieces[-1].append("?" if kind == "operator" else token)
    return SqlStatement(["".join(part) for part in pieces], _first_verb("".join(words)))


def _first_verb(words: str) -> str:
    """Return the first word of the only statement in upper case; in `words`, comments and texts have been replaced.

    Raises `StatementRefused` for no statement, several, and `INTO` a file of the server.
    """
    first = _FIRST_WORD.search(words)
    if first is None:
        raise StatementRefused("There is no statement: the text is empty")
    if words[first.end() :].partition(";")[2].strip("; \t\r\n\f\v"):
        raise StatementRefused(
            "There is more than one statement: only one is run, so nothing may follow its `;`"
        )
    if (into := _INTO_FILE.search(words)) is not None:
        raise StatementRefused(f"INTO {into[1].upper()} is not allowed: it writes a file of the server")
    return first[0].upper()


def _iterate_tokens(text: str, lexer: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    position = 0
    while (token := lexer.match(text, position)) is not None:
        kind = str(token.lastgroup)
        end = _find_token_end(text, token, kind)
        yield kind, text[position:end]
        position = end


def _find_token_end(text: str, token: re.Match[str], kind: str) -> int:
    """Return the position after a token; raises `StatementRefused` for an unterminated or forbidden token."""
    match kind:
        case "nested":
            return _find_nested_end(text, token.end())
        case "dollar":
            closed = text.find(token[0], token.end())
            if closed < 0:
                raise StatementRefused(f"A text that begins with {token[0][:20]} is not closed")
            return closed + len(token[0])
        case "open":
            raise StatementRefused(f"The text or name after {token[0]} is not closed")
        case "numbered":
            raise StatementRefused(f"Write `?` for a value, not {token[0][:10]}")
        case "executed":
            raise StatementRefused(
                f"A comment that begins with {token[0]} is not allowed: the server executes it"
            )
        case _:
            return token.end()


def _find_nested_end(text: str, position: int) -> int:
    depth = 1
    while depth:
        edge = _COMMENT_EDGE.search(text, position)
        if edge is None:
            raise StatementRefused("A comment that begins with /* is not closed")
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position
