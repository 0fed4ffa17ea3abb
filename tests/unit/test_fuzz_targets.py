import pytest

from benchmarks.fuzz import read_result
from benchmarks.fuzz_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_every_parser_accepts_or_refuses_its_seeds_and_their_beginnings(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds():
        for length in {0, 1, len(seed) // 3, len(seed) - 1, len(seed)}:
            target.parse(seed[:length])


def test_a_finding_is_the_end_of_the_output_of_a_process_that_failed() -> None:
    progress = "#2\tINITED cov: 3 ft: 3\n#8192\tpulse  cov: 28 ft: 40\n"
    assert read_result("json", 0, progress).finding is None
    found = read_result("json", 77, progress + "Uncaught Python exception: ValueError")
    assert (found.inputs, found.coverage) == (8192, 28)
    assert "Uncaught Python exception" in str(found.finding)
