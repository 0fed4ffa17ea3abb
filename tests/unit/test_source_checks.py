"""Check of docstrings and import cycles."""

import ast

from tests import source_checks


def parse(**files: str) -> dict[str, ast.Module]:
    return {f"{name.replace('__', '/')}.py": ast.parse(text) for name, text in files.items()}


def find_lines(text: str) -> list[tuple[int, bool]]:
    return sorted((found.line, found.opens) for found in source_checks.find_docstrings(parse(sample=text)))


def test_docstrings_with_pronouns_are_found_at_every_depth() -> None:
    text = '''"""Whatever the module holds."""
class Outer:
    """Keeps what it is given."""
    def method(self):
        """Return the value."""
        if self:
            async def inner():
                """
                How it works."""
'''
    assert find_lines(text) == [(1, True), (3, False), (8, True)]


def test_nouns_and_code_are_no_pronouns() -> None:
    assert find_lines('"""Somewhat wholesale: showhow, elsewhere."""\nvalue = "what"\n"""what"""\n') == []


def test_limits_hold_for_each_package() -> None:
    sources = parse(
        a__one='"""What one is."""', a__two='"""Holds what it needs."""', b__one='"""Hold the who."""'
    )
    findings = list(source_checks.find_docstrings(sources))
    assert list(source_checks.find_excess(findings, {"a": (2, 1), "b": (1, 0)})) == []
    complaints = list(source_checks.find_excess(findings, {"a": (2, 0)}))
    assert "a/one.py:1: begins with a pronoun: What one is." in complaints
    assert "b/one.py:1: leans on a pronoun: Hold the who." in complaints
    assert not any(complaint.startswith("a/two.py") for complaint in complaints)


def test_cycles_include_imports_for_types_and_none_inside_functions() -> None:
    sources = parse(
        a__one="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import two",
        a__two="from a.three import value",
        a__three="import a.one",
        a__four="def load():\n    import a.five",
        a__five="import a.four",
    )
    assert source_checks.find_cycles(sources) == [["a.one", "a.three", "a.two"]]
    assert list(source_checks.find_new_cycles(sources, [frozenset({"a.one", "a.two"})])) == [
        "import cycle: a.one, a.three, a.two"
    ]
    assert (
        list(source_checks.find_new_cycles(sources, [frozenset({"a.one", "a.two", "a.three", "a.six"})]))
        == []
    )
