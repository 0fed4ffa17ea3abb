"""Audit of the locks for known vulnerabilities: run by `make audit`.

pip-audit asks an advisory database about each locked package. A package that the database could not be asked about
counts as "not looked up", never as clean. Exit codes: 0 clean, 1 vulnerable, 2 could not look up everything.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Final

import msgspec

from tests.tools.environments import ToolEnvironment

ROOT: Final = Path(__file__).parents[2]
ENVIRONMENT: Final = ToolEnvironment("release", ROOT / "deploy")
"""pip-audit and cyclonedx-bom, by a lock of their own."""
SOURCES: Final = ("pypi", "osv")
"""Advisory databases, in the order in which they are asked."""
SHOWN_LINES: Final = 3


class Advisory(msgspec.Struct):
    """Known vulnerability of a package version."""

    id: str
    fix_versions: list[str] = []


class AuditedPackage(msgspec.Struct):
    """Locked package with its advisories; `skip_reason` is set if the database could not be asked about it."""

    name: str
    version: str = ""
    vulns: list[Advisory] = []
    skip_reason: str | None = None


class AuditReport(msgspec.Struct):
    """Answer of pip-audit about one lock."""

    dependencies: list[AuditedPackage]


class AuditSourceUnavailable(Exception):
    """No advisory database answered; the message has the last lines of each attempt."""


def main() -> int:
    """Audit every lock of the repository, print the findings, and return the gravest exit code."""
    codes = [print_audit(lock) for lock in find_locks()]
    return reduce(combine_codes, codes, 0)


def print_audit(lock: Path) -> int:
    """Audit one lock, print the findings, and return the exit code; 2 if no advisory database can be reached."""
    name = str(lock.relative_to(ROOT))
    try:
        report = audit_lock(lock)
    except AuditSourceUnavailable as error:
        print(f"{name}: not looked up, no advisory database can be reached\n{error}")
        return 2
    print(*describe_report(name, report), sep="\n")
    return judge_report(report)


def find_locks() -> Sequence[Path]:
    """Return the path of every lock of Python packages in the repository, sorted."""
    locks = (*ROOT.glob("requirements*.lock"), *ROOT.glob("docs/*/*.lock"), *ROOT.glob("deploy/*/*.lock"))
    return sorted((*locks, *ROOT.glob("tests/tools/*/*.lock")))


def audit_lock(lock: Path) -> AuditReport:
    """Return the report about a lock from the first advisory database that knows every package,
    else the most complete one.

    Raises AuditSourceUnavailable if no database answers at all.
    """
    reports: list[AuditReport] = []
    failures: list[str] = []
    for source in SOURCES:
        command = [str(ENVIRONMENT.folder / "bin/pip-audit"), "--vulnerability-service", source]
        command += ["--format", "json", "--progress-spinner", "off", "--require-hashes", "--disable-pip"]
        done = subprocess.run(
            [*command, "--requirement", str(lock)], capture_output=True, text=True, check=False
        )
        try:
            report = msgspec.json.decode(done.stdout, type=AuditReport)
        except msgspec.DecodeError:
            failures.append(f"  {source}: {' '.join(done.stderr.strip().splitlines()[-SHOWN_LINES:])[:300]}")
            continue
        if not count_skipped(report):
            return report
        reports.append(report)
    if not reports:
        raise AuditSourceUnavailable("\n".join(failures))
    return min(reports, key=count_skipped)


def count_skipped(report: AuditReport) -> int:
    """Return the number of packages that the database could not be asked about."""
    return sum(package.skip_reason is not None for package in report.dependencies)


def judge_report(report: AuditReport) -> int:
    """Return the exit code of a report: 1 if a package is vulnerable, else 2 if one was not looked up, else 0."""
    if any(package.vulns for package in report.dependencies):
        return 1
    return 2 if count_skipped(report) else 0


def combine_codes(first: int, second: int) -> int:
    """Return the graver of two exit codes: a vulnerability counts before a package that was not looked up."""
    return 1 if 1 in (first, second) else max(first, second)


def describe_report(name: str, report: AuditReport) -> Iterator[str]:
    """Yield the result of one lock as lines of text: counts, vulnerabilities, and a reason for missing answers."""
    total, skipped = len(report.dependencies), count_skipped(report)
    vulnerable = [package for package in report.dependencies if package.vulns]
    yield f"{name}: {total - skipped} of {total} packages looked up, {len(vulnerable)} vulnerable"
    for package in vulnerable:
        for advisory in package.vulns:
            fixed = ", ".join(advisory.fix_versions) or "no release yet"
            yield f"  {package.name} {package.version}: {advisory.id}, fixed in {fixed}"
    if skipped:
        reason = next(package.skip_reason for package in report.dependencies if package.skip_reason)
        yield f"  {skipped} not looked up, such as: {reason}"


if __name__ == "__main__":
    sys.exit(main())
