"""Tests of the ordinary run: each on one database, the same one at any time, and all with the mark or option."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodes.sandbox.code.code_backend import CodeBackend
from nodes.sql_text import SqlDialect
from tests import conftest


@dataclass(eq=False)
class CollectedTest:
    """The parts of a test that the choice reads."""

    nodeid: str
    parameters: dict[str, object]
    mark: str | None = None
    path: Path = field(default=Path("test_sample.py"))

    @property
    def callspec(self) -> SimpleNamespace:
        return SimpleNamespace(params=self.parameters)

    def get_closest_marker(self, name: str) -> str | None:
        return self.mark if self.mark == name else None


@dataclass
class Run:
    """The parts of a run's configuration that the choice reads."""

    args: list[str]
    is_thorough: bool = False
    with_toolchains: bool = False
    left_out: list[CollectedTest] = field(default_factory=list)

    def getoption(self, name: str) -> bool:
        return {"thorough": self.is_thorough, "toolchains": self.with_toolchains}[name]

    @property
    def hook(self) -> SimpleNamespace:
        return SimpleNamespace(pytest_deselected=self.leave_out)

    def leave_out(self, items: list[CollectedTest]) -> None:
        self.left_out += items


def collect(cases: int) -> list[CollectedTest]:
    """Return tests as pytest collects them: a number of cases on each database, and others."""
    kinds = ("sqlite", "postgresql")
    return [
        *(
            CollectedTest(f"test_one[{kind}-{case}]", {"harness": kind, "case": case})
            for kind in kinds
            for case in range(cases)
        ),
        *(
            CollectedTest(f"test_script[{backend}-{case}]", {"bench": backend, "case": case})
            for backend in CodeBackend
            for case in range(cases)
        ),
        *(CollectedTest(f"test_all[{kind}]", {"harness": kind}, "every_database") for kind in kinds),
        *(CollectedTest(f"test_dialects[{kind}]", {"dialect": SqlDialect(kind)}) for kind in kinds),
        *(CollectedTest(f"test_sources[{kind}]", {"source": kind}) for kind in ("sqlite", "mysql")),
        CollectedTest("test_long[sqlite]", {"harness": "sqlite"}, "thorough"),
        CollectedTest("test_compiler", {}, "toolchain"),
    ]


def choose(run: Run, cases: int = 40) -> set[str]:
    """Return the names of the tests that a run keeps."""
    tests = cast("list[Any]", collect(cases))
    conftest.pytest_collection_modifyitems(cast("Any", run), tests)
    kept = {test.nodeid for test in tests}
    left_out = {test.nodeid for test in run.left_out}
    assert not kept & left_out
    assert kept | left_out == {test.nodeid for test in collect(cases)}
    return kept


def test_the_ordinary_run_has_each_test_once_on_a_lasting_choice_of_database() -> None:
    kept = choose(Run(["tests"]))
    assert choose(Run(["tests"]), cases=8) <= kept, "further cases move no other"
    cases = [name for name in kept if name.startswith("test_one")]
    assert sorted(int(name.rstrip("]").rpartition("-")[2]) for name in cases) == list(range(40))
    assert 10 <= sum("sqlite" in name for name in cases) <= 30
    scripts = [name for name in kept if name.startswith("test_script")]
    assert len(scripts) == 40
    assert 10 <= sum(CodeBackend.MONTY in name for name in scripts) <= 30


def test_the_mark_enumerations_and_other_kinds_keep_all() -> None:
    kept = choose(Run(["tests"]))
    assert {name for name in kept if not name.startswith(("test_one", "test_script"))} == {
        *("test_all[sqlite]", "test_all[postgresql]"),
        *("test_dialects[sqlite]", "test_dialects[postgresql]"),
        *("test_sources[sqlite]", "test_sources[mysql]"),
    }


def test_an_option_adds_the_tests_of_toolchains_to_the_ordinary_ones() -> None:
    assert choose(Run(["tests"], with_toolchains=True)) == {*choose(Run(["tests"])), "test_compiler"}


@pytest.mark.parametrize("run", [Run(["tests"], is_thorough=True), Run(["test_sample.py::test_one"])])
def test_a_thorough_run_and_one_of_named_tests_keep_all(run: Run) -> None:
    choose(run)
    assert run.left_out == []
