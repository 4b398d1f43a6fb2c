"""Marks of when the lines of a log were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.host import log_times
from hypeman.host.log_times import SUFFIX, LogTimes, Mark, Times, begin_run, move_times, read_times


def grow(log: Path, text: str, second: int) -> None:
    """Written at ``second``."""
    with log.open("a") as file:
        file.write(text)
    os.utime(log, (second, second))


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 10**18), st.booleans())), st.integers(0, 2000))
def test_a_line_is_between_two_marks(steps: list[tuple[int, int, bool]], end: int) -> None:
    """Also where the clock went back."""
    offset, marks = 0, []
    for size, moment, begins in steps:
        offset += size
        marks.append(Mark(offset, moment, begins))
    times = Times.parse(b"".join(mark.packed() for mark in marks) + b"torn")
    assert times == Times(tuple(marks))
    behind = [mark.time for mark in marks if mark.offset >= end]
    assert times.time_of(end) == (behind[0] if behind else None)


def test_what_is_noted(tmp_path: Path) -> None:
    log, times = tmp_path / "app.log", LogTimes()
    times.note([log])
    assert read_times(log) == Times(), "there is no log yet"
    grow(log, "one\n", 100)
    times.note([log])
    times.note([log])
    grow(log, "two\n", 200)
    LogTimes().note([log])  # another server
    assert read_times(log) == Times((Mark(4, 100 * 10**9), Mark(8, 200 * 10**9)))
    assert [read_times(log).time_of(end) for end in (4, 5, 8, 9)] == [100 * 10**9, 200 * 10**9, 200 * 10**9, None]
    assert [read_times(log).begin_since(second * 10**9) for second in (100, 101, 200, 201)] == [None, 4, 4, 8]


def test_a_run_begins_once(tmp_path: Path) -> None:
    """A launch that is repeated before anything was printed is the same run."""
    log = tmp_path / "app.log"
    begin_run(log)
    begin_run(log)
    grow(log, "one\n", 100)
    LogTimes().note([log])
    begin_run(log)
    begin_run(log)
    assert read_times(log).runs() == (0, 4)


def test_marks_follow_the_log(tmp_path: Path) -> None:
    """Over its rotation, and not beyond: the marks of what is gone do not stay."""
    log, times = tmp_path / "app.log", LogTimes()
    grow(log, "a long line\n", 100)
    times.note([log])
    old = log.rename(tmp_path / "app.log.1")
    move_times(log, old)
    grow(log, "b\n", 200)
    times.note([log])
    assert (read_times(old).marks, read_times(log).marks) == ((Mark(12, 100 * 10**9),), (Mark(2, 200 * 10**9),))
    os.truncate(log, 0)
    grow(log, "c", 300)
    times.note([log])
    assert read_times(log).marks == (Mark(1, 300 * 10**9),)


def test_marks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest are kept, and where the last two runs begin."""
    monkeypatch.setattr(log_times, "MAX_MARKS", 64)
    log, times = tmp_path / "app.log", LogTimes()
    for second in range(1000):
        if second in (0, 1, 3):
            begin_run(log)
        grow(log, "x\n", second)
        times.note([log])
        assert (tmp_path / f"app.log{SUFFIX}").stat().st_size <= 64 * 16
    found = read_times(log)
    assert found.runs()[-2:] == (2, 6)
    assert found.marks[-30:] == tuple(Mark(2 * second + 2, second * 10**9) for second in range(970, 1000))


def test_a_torn_mark_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    (tmp_path / f"app.log{SUFFIX}").write_bytes(Mark(2, 5).packed() + b"torn")
    grow(log, "one\n", 7)
    LogTimes().note([log])
    assert read_times(log).marks == (Mark(2, 5), Mark(4, 7 * 10**9))


def test_a_log_that_cannot_be_noted_is_measured(tmp_path: Path) -> None:
    """It may have filled the disk, and is rotated by its size. It is noted when that is possible."""
    log, times = tmp_path / "app.log", LogTimes()
    log.write_bytes(b"much\n")
    marks = Path(f"{log}{SUFFIX}")
    marks.mkdir()
    assert times.note([log, tmp_path / "missing.log"]) == {log: 5}
    marks.rmdir()
    assert times.note([log]) == {log: 5}
    assert [mark.offset for mark in read_times(log).marks] == [5]
