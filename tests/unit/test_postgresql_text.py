"""Literals of PostgreSQL arrays, which pass a column of a batch as one text."""

from journal.postgresql.postgresql_text import array_literal, transpose_rows


def test_elements_are_quoted_as_postgresql_reads_them() -> None:
    assert array_literal(["a", "", 'say "no"', "back\\slash", "NULL", "{1,2}", "line\nend"]) == (
        '{"a","","say \\"no\\"","back\\\\slash","NULL","{1,2}","line\nend"}'
    )
    assert array_literal(["a", None, 'b"', "\\"]) == '{"a",NULL,"b\\"","\\\\"}'
    assert array_literal([1, None, -2]) == "{1,NULL,-2}"
    assert array_literal([True, False]) == "{True,False}"
    assert array_literal([b"\x00\xff", None, b""]) == '{"\\\\x00ff",NULL,"\\\\x"}'


def test_a_text_with_the_separator_stays_one_element() -> None:
    assert array_literal(["a\0b"]) == '{"a\0b"}'
    assert array_literal(["a", "b\0c"]) == '{"a","b\0c"}'


def test_columns_without_values_are_empty_arrays() -> None:
    assert transpose_rows([(1, None, "a"), (2, None, None)], 3) == ["{1,2}", "{}", '{"a",NULL}']
    assert transpose_rows([], 2) == ["{}", "{}"]
