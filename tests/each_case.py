"""One test for many cheap cases: starting and reporting a test costs several times as much as such a check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest

AnyCase = TypeVar("AnyCase")


def check_each(
    cases: Iterable[tuple[str, AnyCase]],
) -> Callable[[Callable[[AnyCase], None]], Callable[[], None]]:
    """Return a decorator that turns a check of one case into one test of all cases, each given with its name.

    The test goes on after a failure, and fails with an exception group of all failures, each noted with the name of its
    case.
    """
    named = list(cases)
    assert named, "a test without a case proves nothing"

    def of_all(check: Callable[[AnyCase], None]) -> Callable[[], None]:
        def test() -> None:
            failures: list[BaseException] = []
            for name, case in named:
                try:
                    check(case)
                # `pytest.raises` and `pytest.fail` fail by what is no `Exception`.
                except (Exception, pytest.fail.Exception) as failure:  # noqa: BLE001 - reported together at the end
                    failure.add_note(f"case: {name}")
                    failures.append(failure)
            if failures:
                raise BaseExceptionGroup(f"{len(failures)} of {len(named)} cases", failures)

        # Not `functools.wraps`: through `__wrapped__`, pytest would take the case for a fixture.
        test.__name__, test.__qualname__ = check.__name__, check.__qualname__
        test.__module__, test.__doc__ = check.__module__, check.__doc__
        return test

    return of_all
