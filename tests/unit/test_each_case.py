"""Tests of many cases: every failing case fails its test, by its name."""

from __future__ import annotations

import pytest

from tests.each_case import check_each


def test_every_failing_case_is_reported_by_its_name() -> None:
    @check_each([("right", "x"), ("other error", None), ("raises nothing", "2"), ("fails", "3")])
    def check(case: str | None) -> None:
        assert case is not None
        if case == "3":
            pytest.fail("of no use")
        with pytest.raises(ValueError, match="x"):
            int(case)

    with pytest.raises(BaseExceptionGroup, match="3 of 4 cases") as failed:
        check()
    notes = [failure.__notes__ for failure in failed.value.exceptions]
    assert notes == [["case: other error"], ["case: raises nothing"], ["case: fails"]]
