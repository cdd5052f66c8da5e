"""Progress: silence without a terminal, a bar with its details on one."""

import io

import pytest

from llmsparse.progress import Bar, Quiet, progress_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_only_a_terminal_that_no_machine_reads_gets_a_bar(terminal: Terminal) -> None:
    assert isinstance(progress_for(terminal), Bar)
    assert isinstance(progress_for(terminal, json=True), Quiet)
    assert isinstance(progress_for(io.StringIO()), Quiet)


def test_the_bar_shows_phase_count_detail_and_message_as_they_are(terminal: Terminal) -> None:
    with progress_for(terminal) as bar:
        bar.start("reading", 1)
        bar.start("pruning", 3)
        bar.now("forward")
        bar.tell("pruning", "error 0.0123 [/not markup]")
        bar.message("a [message]")
        bar.advance("pruning")
        bar.advance("pruning", "error 0.0456")
        bar.now("solve")
    shown = terminal.getvalue()
    for expected in ("pruning", "2/3", "error 0.0456", "a [message]"):
        assert expected in shown
    assert "solve" in shown.split("pruning")[-1] and "forward" not in shown.split("pruning")[-1]


def test_a_phase_may_start_again_and_an_unannounced_one_counts(terminal: Terminal) -> None:
    with progress_for(terminal) as bar:
        bar.start("pruning", 2)
        bar.advance("pruning")
        bar.start("pruning", 5)
        bar.advance("unannounced")
    last = terminal.getvalue().split("pruning")[-1]
    assert "0/5" in last and "unannounced" in last and "1/?" in last


def test_leaving_the_bar_gives_the_cursor_back_after_an_error(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), progress_for(terminal) as bar:
        bar.start("pruning", 1)
        raise KeyboardInterrupt
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_silence_takes_every_call(capfd: pytest.CaptureFixture[str]) -> None:
    with Quiet() as quiet:
        quiet.start("pruning", 3)
        quiet.advance("pruning", "detail")
        quiet.tell("pruning", "detail")
        quiet.now("forward")
        quiet.message("text")
    assert capfd.readouterr() == ("", "")
