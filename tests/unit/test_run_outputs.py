from pilotflame import run_outputs


def test_a_terminal_is_shown_the_beginning_of_many_and_of_long_lines() -> None:
    assert run_outputs.truncate("one\ntwo") == ("one\ntwo", False)
    shown, is_cut = run_outputs.truncate("\n".join(["x" * 10_000] * 1_234))
    lines = shown.splitlines()
    assert is_cut
    assert len(lines) == run_outputs.MAX_LINES + 1
    assert max(map(len, lines)) == run_outputs.MAX_LINE_CHARACTERS + 1
    assert lines[-1] == "… 1,134 more lines"
