"""The progress that a merge shows on a terminal."""

from __future__ import annotations

import io
import re
import time

import pytest
import rich.console

from cluster.progress import Progress

# Escape sequences: colours, movements of the cursor, and erased lines.
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """A terminal of 60 columns, and what was written to it."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.console = rich.console.Console(file=self.file, force_terminal=True, width=60, highlight=False)

    def lines(self) -> list[str]:
        """Return all lines that were written, those of earlier states of the rows included."""
        return [line.strip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", self.file.getvalue())) if line.strip()]

    def last(self, text: str) -> str:
        """Return the last line that contains a text."""
        return [line for line in self.lines() if text in line][-1]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


def test_a_phase_shows_the_time_left_and_leaves_one_line(screen: Screen) -> None:
    with Progress(console=screen.console) as progress:
        progress.phase("stage 1", 4)
        for done in (1, 2, 3):
            time.sleep(0.05)
            progress.advance("stage 1", done, "kl 0.5")
        progress._live.refresh()
        assert re.search(r"stage 1 .* 3/4 .* left .*kl 0.5", screen.last("3/4"))
        progress.advance("stage 1", 4, "kl 0.4")
        ended = len(screen.file.getvalue())
        progress._live.refresh()
        assert "stage 1" not in screen.file.getvalue()[ended:], "a completed phase does not count on"
        assert "starting" in screen.file.getvalue()[ended:], "something moves"
    assert re.fullmatch(r"stage 1  4/4  \d+:\d\d  kl 0.4", screen.last("4/4"))
    assert set(progress.seconds) == {"stage 1"}


def test_phases_of_a_lost_attempt_do_not_count_on(screen: Screen) -> None:
    with Progress(console=screen.console) as progress:
        progress.phase("targets", 3)
        progress.phase("writing", 2)
        progress.lost("a node was lost; resuming")
        lost = len(screen.file.getvalue())
        progress.phase("targets", 3, 3)
        progress.phase("writing", 2, 1)
        progress._live.refresh()
        after = ESCAPES.sub("", screen.file.getvalue()[lost:])
    assert "a node was lost; resuming" in screen.lines()
    assert "targets" not in after, "nothing is left to do"
    assert "1/2" in after and "0/2" not in after


def test_rows_stay_within_the_width_and_lines_are_whole(screen: Screen) -> None:
    # A row that the terminal wraps is not erased wholly, and the next line sticks to its rest.
    line = "word " * 40
    with Progress(console=screen.console) as progress:
        progress.phase("stage 1", 9)
        progress.advance("stage 1", 1, "note " * 40)
        progress._live.refresh()
        progress.say(line)
    rows = [text for text in screen.lines() if text.startswith(("-", "\\", "|", "/"))]
    assert rows and max(map(len, rows)) <= 60
    assert line.strip() in screen.lines()


def test_elsewhere_every_part_is_a_line() -> None:
    file = io.StringIO()
    with Progress(console=rich.console.Console(file=file, highlight=False)) as progress:
        progress.wait("loading")
        progress.phase("stage 1", 3, 1)
        progress.advance("stage 1", 2, "kl 0.5")
        progress.advance("stage 1", 3)
    lines = [line.partition("] ")[2] for line in file.getvalue().splitlines()]
    assert lines == ["stage 1: 3 (1 done before)", "stage 1 2/3  kl 0.5", "stage 1 3/3"]
