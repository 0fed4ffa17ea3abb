"""Check of docstrings, names of types and import cycles."""

import ast
from pathlib import Path

import pytest

from tests import source_checks, source_ledger


def parse(**files: str) -> dict[str, ast.Module]:
    return {f"{name.replace('__', '/')}.py": ast.parse(text) for name, text in files.items()}


def find_faults(text: str) -> list[tuple[int, bool]]:
    docstrings = source_checks.list_docstrings(parse(sample=text))
    return sorted((found.line, found.opens) for found in docstrings if found.leans or found.opens)


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
    assert find_faults(text) == [(1, True), (3, False), (8, True)]


def test_nouns_and_code_are_no_pronouns() -> None:
    assert find_faults('"""Somewhat wholesale: showhow, elsewhere."""\nvalue = "what"\n"""what"""\n') == []


def test_no_docstring_may_begin_with_a_pronoun_and_few_may_lean_on_one() -> None:
    def find(leaning: int, plain: int, *texts: str) -> list[str]:
        texts = (*texts, *["Holds what it needs."] * leaning, *["Plain."] * plain)
        docstrings = [
            source_checks.SourceDocstring("a/one.py", line, text) for line, text in enumerate(texts, 1)
        ]
        return list(source_checks.find_wordy_docstrings(docstrings))

    assert find(2, 98) == []
    assert find(1, 98, "Where it is.") == ["begins with a pronoun: a/one.py:1: Where it is."]
    complaints = find(3, 97)
    assert complaints[0].startswith("3 of 100 docstrings lean")
    assert complaints[1:] == [
        f"leans on a pronoun: a/one.py:{line}: Holds what it needs." for line in (1, 2, 3)
    ]


def test_cycles_include_imports_for_types_and_inside_functions() -> None:
    sources = parse(
        a__one="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import two",
        a__two="from a.three import value",
        a__three="import a.one",
        a__four="def load():\n    import a.five",
        a__five="import a.four",
    )
    assert source_checks.find_cycles(sources) == [["a.one", "a.three", "a.two"], ["a.five", "a.four"]]


def test_two_types_may_not_share_a_name() -> None:
    sources = parse(
        a__one="class Run: ...\nclass Step: ...",
        a__two="def make():\n  class Run: ...",
        sdk__types="class Step: ...",
    )
    assert list(source_checks.find_shared_type_names(sources)) == [
        "several types are named Run: a/one.py:1, a/two.py:2"
    ]


def test_the_product_uses_each_of_its_functions_and_types() -> None:
    texts = {
        "a/one.py": "def start(): ...\ndef stop(): ...\nclass Row: ...\n@command\ndef show(): ...",
        "a/two.py": "from a.one import start",
        "tests/a.py": "from a.one import Row, stop",
    }
    sources = {path: ast.parse(text) for path, text in texts.items()}
    assert list(source_checks.find_unused(sources, texts)) == [
        "nothing uses stop: a/one.py:2",
        "nothing uses Row: a/one.py:3",
    ]


def test_only_handlers_may_take_a_whole_request_or_state() -> None:
    sources = parse(
        gateway__runs__routes="from gateway.runs import runs, shapes\nTABLE = [runs.start, shapes.Run]",
        gateway__runs__runs="async def start(request: GatewayRequest): ...\ndef _plan(request: GatewayRequest): ...",
        gateway__runs__shapes="class Run:\n  request: GatewayRequest\n  def show(self, gateway: 'GatewayState'): ...",
        gateway__runs__rows="async def insert(*, request: GatewayRequest | None): ...\ndef find(key: Key): ...",
        gateway__http__endpoint="def call(request: GatewayRequest): ...",
        workers__main="def run(gateway: GatewayState): ...",
    )
    assert sorted(source_checks.find_whole_parameters(sources)) == [
        "takes 'GatewayState': gateway of show in gateway.runs.shapes, line 3",
        "takes GatewayRequest | None: request of insert in gateway.runs.rows, line 1",
        "takes GatewayRequest: request of Run in gateway.runs.shapes, line 1",
    ]


def test_the_ledger_counts_code_docstrings_locals_and_structs(tmp_path: Path) -> None:
    text = '''"""Module."""
import msgspec
from sqlmodel import select

# A comment.
class Row(msgspec.Struct):
    """Row."""


def _read(found):
    """Return a row,

    in a docstring of three lines."""
    return Row()


def read():
    text = """a
string"""
    return _read(text)
'''
    (tmp_path / "sample.py").write_text(text)
    figures = source_ledger.measure(
        tmp_path, {"sample.py": ast.parse(text), "tests/a.py": ast.parse("one = 1")}
    )
    assert figures | {"folders": 2} == {
        "folders": 2,
        "files": 1,
        "SLOC": 9,
        "statements": 11,
        "docstrings, % of lines": 25.0,
        "private functions with a docstring, %": 100.0,
        "private functions used once, % of functions": 50.0,
        "functions with vague locals, %": 50.0,
        "structs built in one place": 1,
        "modules with SQL outside models and journal": 1,
        "modules that name the table Execution": 0,
        "uses of col": 0,
        "uses of OrderedDict": 0,
    }


def test_a_figure_of_the_ledger_may_fall_but_not_rise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings = tmp_path / "ceilings.toml"
    ceilings.write_text('"files" = 10\n')
    monkeypatch.setattr(source_ledger, "CEILINGS", ceilings)
    assert list(source_ledger.find_growth({"files": 10})) == []
    assert len(list(source_ledger.find_growth({"files": 11}))) == 1
    assert len(list(source_ledger.find_growth({"files": 10, "SLOC": 1}))) == 1
    source_ledger.lower_ceilings({"files": 9})
    source_ledger.lower_ceilings({"files": 12})
    assert source_ledger.read_ceilings() == {"files": 9}
