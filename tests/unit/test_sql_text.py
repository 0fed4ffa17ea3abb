import pytest

from nodes import sql_text
from nodes.sql_text import SqlDialect, StatementRefused

EVERY = list(SqlDialect)
POSTGRESQL, MYSQL, SQLITE = SqlDialect.POSTGRESQL, SqlDialect.MYSQL, SqlDialect.SQLITE


def mark_places(text: str, dialect: SqlDialect) -> str:
    """Return the statement with `<0>`, `<1>`, … where values belong."""
    statement = sql_text.parse_statement(text, dialect)
    return statement.with_placeholders([f"<{number}>" for number in range(statement.placeholder_count)])


@pytest.mark.parametrize("dialect", EVERY)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT ?, ?", "SELECT <0>, <1>"),
        ("SELECT '?', ? -- ?\n, ?", "SELECT '?', <0> -- ?\n, <1>"),
        ("SELECT 'it''s ?', ?", "SELECT 'it''s ?', <0>"),
        ("SELECT /* ? ' */ ?", "SELECT /* ? ' */ <0>"),
        ('SELECT "a?""?" = ?', 'SELECT "a?""?" = <0>'),
        ("SELECT a.b, 1.5e3, x-1 FROM t WHERE y=?;", "SELECT a.b, 1.5e3, x-1 FROM t WHERE y=<0>"),
        ("SELECT ? ; -- done\n ; ", "SELECT <0>  -- done\n  "),
        ("(SELECT ?)", "(SELECT <0>)"),
    ],
)
def test_a_value_belongs_where_a_question_mark_stands_in_the_open(
    text: str, expected: str, dialect: SqlDialect
) -> None:
    assert mark_places(text, dialect) == expected


@pytest.mark.parametrize(
    ("dialect", "text", "expected"),
    [
        (POSTGRESQL, r"SELECT E'\'?', ?", r"SELECT E'\'?', <0>"),
        (POSTGRESQL, r"SELECT '\', ?", r"SELECT '\', <0>"),
        (POSTGRESQL, "SELECT $$ ? ; ' $$, $a$ $b$ ? $a$, ?", "SELECT $$ ? ; ' $$, $a$ $b$ ? $a$, <0>"),
        (POSTGRESQL, "SELECT a$b$, c$b$ + ?", "SELECT a$b$, c$b$ + <0>"),
        (POSTGRESQL, "SELECT /* /* ? */ ? */ ?", "SELECT /* /* ? */ ? */ <0>"),
        (POSTGRESQL, "SELECT a ?? 'x', a ??| ?", "SELECT a ? 'x', a ?| <0>"),
        (POSTGRESQL, "SELECT U&'?' , N'?', ?::int", "SELECT U&'?' , N'?', <0>::int"),
        (MYSQL, r"""SELECT '\'?', "\"?", ?""", r"""SELECT '\'?', "\"?", <0>"""),
        (MYSQL, "SELECT `a``?`, ? # ?", "SELECT `a``?`, <0> # ?"),
        (MYSQL, "SELECT 5--?", "SELECT 5--<0>"),
        (MYSQL, "SELECT /* /* ? */ ?", "SELECT /* /* ? */ <0>"),
        (SQLITE, "SELECT [a?], `?`, ? /* ?", "SELECT [a?], `?`, <0> /* ?"),
    ],
)
def test_each_dialect_quotes_in_its_own_way(dialect: SqlDialect, text: str, expected: str) -> None:
    assert mark_places(text, dialect) == expected


@pytest.mark.parametrize("dialect", EVERY)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ; ",
        "-- only this",
        "SELECT 1; SELECT 2",
        "SELECT 1;;; x",
        "SELECT 1 /* ; */ ; /* ; */ DROP TABLE t",
        "SELECT 'open",
        'SELECT "open',
        "SELECT 1\0",
        "SELECT x INTO /* */ OutFile '/tmp/x'",
        "SELECT x INTO DUMPFILE '/tmp/x'",
        "SELECT " + "1," * 60_000,
    ],
)
def test_texts_other_than_one_whole_statement_are_refused(text: str, dialect: SqlDialect) -> None:
    with pytest.raises(StatementRefused):
        sql_text.parse_statement(text, dialect)


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (POSTGRESQL, "SELECT $1"),
        (POSTGRESQL, "SELECT $$ open"),
        (POSTGRESQL, "SELECT /* /* */"),
        (POSTGRESQL, r"SELECT E'\'"),
        (MYSQL, "SELECT /*!50000 1 */"),
        (MYSQL, "SELECT /*M! 1 */"),
        (MYSQL, "SELECT /*+ MAX_EXECUTION_TIME(0) */ 1"),
        (MYSQL, "SELECT /* open"),
        (MYSQL, r"SELECT '\'"),
        (MYSQL, "SELECT `open"),
        (SQLITE, "SELECT [open"),
    ],
)
def test_a_statement_that_a_dialect_forbids_is_refused(dialect: SqlDialect, text: str) -> None:
    with pytest.raises(StatementRefused):
        sql_text.parse_statement(text, dialect)


def test_a_statement_begins_with_its_verb() -> None:
    assert sql_text.parse_reading("/* x */ ( with a AS (SELECT 1) SELECT 1)", SQLITE, 0).verb == "WITH"
    assert sql_text.parse_writing("insert INTO t VALUES (?)", MYSQL, 1).verb == "INSERT"
    with pytest.raises(StatementRefused, match="COPY is not a statement that reads"):
        sql_text.parse_reading("COPY t TO PROGRAM 'id'", POSTGRESQL, 0)
    with pytest.raises(StatementRefused, match="SET is not a statement that writes"):
        sql_text.parse_writing("SET x = 1", POSTGRESQL, 0)


def test_names_are_quoted_as_the_dialect_does_it() -> None:
    assert sql_text.quote_name('a"b`', POSTGRESQL) == '"a""b`"'
    assert sql_text.quote_name('a"b`', MYSQL) == '`a"b```'
    assert sql_text.quote_table("shop.orders", SQLITE) == '"shop"."orders"'
    for name in ("", "a..b", "a.b.c.d", "a\0", "x" * 65):
        with pytest.raises(StatementRefused):
            sql_text.quote_table(name, MYSQL)


def test_a_long_text_is_read_in_a_moment() -> None:
    for text in (
        "'" + "''" * 49_000,
        "/*" * 49_000,
        "SELECT " + "(" * 90_000,
        "$a" * 49_000,
        "SELECT '" + "\\'" * 49_000,
    ):
        for dialect in EVERY:
            try:
                sql_text.parse_statement(text, dialect)
            except StatementRefused:
                continue
