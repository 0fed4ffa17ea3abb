from deploy.release.audit import (
    Advisory,
    AuditedPackage,
    AuditReport,
    combine_codes,
    describe_report,
    find_locks,
    judge_report,
)

CLEAN = AuditedPackage("clean", "1.0")
VULNERABLE = AuditedPackage("weak", "2.0", [Advisory("CVE-2026-1", ["2.1"])])
UNKNOWN = AuditedPackage("unknown", skip_reason="not found: unknown (3.0)")


def test_packages_that_were_not_looked_up_are_never_clean() -> None:
    assert judge_report(AuditReport([CLEAN])) == 0
    assert judge_report(AuditReport([CLEAN, UNKNOWN])) == 2
    assert judge_report(AuditReport([UNKNOWN, VULNERABLE])) == 1
    assert [combine_codes(2, 1), combine_codes(1, 2), combine_codes(0, 2), combine_codes(0, 0)] == [
        1,
        1,
        2,
        0,
    ]


def test_a_report_names_the_advisory_and_the_release_that_fixes_it() -> None:
    assert list(describe_report("some.lock", AuditReport([CLEAN, VULNERABLE, UNKNOWN]))) == [
        "some.lock: 2 of 3 packages looked up, 1 vulnerable",
        "  weak 2.0: CVE-2026-1, fixed in 2.1",
        "  1 not looked up, such as: not found: unknown (3.0)",
    ]


def test_every_lock_of_python_packages_is_audited() -> None:
    names = {"/".join(lock.parts[-2:]) for lock in find_locks()}
    assert {"site/requirements.lock", "release/requirements.lock", "schemathesis/requirements.lock"} <= names
