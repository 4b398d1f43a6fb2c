"""Log following: no line lost or doubled, whatever happens to the file."""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hypeman.errors import InvalidRequest, NotFound
from hypeman.host.log_times import LogTimes, begin_run, move_times
from hypeman.instances.model.types import LogRun
from hypeman.server import follow, inotify
from hypeman.server.follow import LineCutter, Lines, LogStream, encode_events, find_tail


def lines_of(chunk: bytes) -> list[str]:
    """The lines in a chunk of events, as a client of such events sees them; fails unless the events are whole."""
    assert chunk.endswith(b"\n\n")
    events = [re.sub(rb"^:[^\n]*\n", b"", event) for event in chunk[:-2].split(b"\n\n")]
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    return [json.loads(event[6:]) for event in events]


async def read_all(path: Path, tail: int = 100) -> list[str]:
    stream = await LogStream.open(str(path), Lines(tail=tail))
    return [line async for chunk in stream for line in lines_of(chunk)]


class Collector:
    """A follower in a task of its own; ``wait_for`` waits until the lines so far satisfy a condition."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ended = False
        self._more = trio.Event()

    async def run(self, path: Path, tail: int = 0, *, task_status: trio.TaskStatus[None]) -> None:
        stream = await LogStream.open(str(path), Lines(tail=tail, follow=True))
        task_status.started()
        async for chunk in stream:
            self.lines += lines_of(chunk)
            self._more.set()
        self.ended = True
        self._more.set()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():
                self._more = trio.Event()
                await self._more.wait()

    async def wait_line(self, line: str) -> None:
        await self.wait_for(lambda: self.lines[-1:] == [line])


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=40), min_size=1))
def test_events_hold_exactly_the_lines(lines: list[str]) -> None:
    assert lines_of(encode_events("".join(line + "\n" for line in lines).encode())) == lines


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"plain\n", "plain"),
        (b"dos\r\n", "dos"),
        (b'a "quote" and a \\\n', 'a "quote" and a \\'),
        (b"\x1b[31mred\x1b[0m\n", "\x1b[31mred\x1b[0m"),
        (b"broken \xff utf-8\n", "broken � utf-8"),
        (b"a\rb\n", "a\rb"),
        (b"tab\there\n", "tab\there"),
        ("grüß\n".encode(), "grüß"),
    ],
)
def test_odd_bytes(raw: bytes, line: str) -> None:
    assert lines_of(encode_events(raw)) == [line]


@given(st.binary(max_size=300), st.integers(0, 12), st.integers(1, 7))
def test_tail_finds_the_same_place_as_splitting(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, lines: int, block: int
) -> None:
    """Checked against the simplest way to say it, with blocks so small that every edge is met."""
    data = data.replace(b"\0", b"\n")
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    before, follow.BLOCK = follow.BLOCK, block
    try:
        offset, missing = find_tail(fd, lines)
    finally:
        follow.BLOCK = before
        os.close(fd)
    every = [*re.findall(rb"[^\n]*\n|[^\n]+", data)]
    wanted = every[len(every) - lines :] if lines <= len(every) else every
    assert data[offset:] == (b"".join(wanted) if lines else b"")
    assert missing == max(0, lines - len(every))


@given(st.lists(st.binary(max_size=30)))
def test_cutting_does_not_depend_on_the_blocks(blocks: list[bytes]) -> None:
    cutter = LineCutter()
    cut = b"".join(cutter.feed(block) for block in blocks if block) + cutter.flush()
    whole = b"".join(blocks)
    assert cut == whole + (b"\n" if whole and not whole.endswith(b"\n") else b"")


@pytest.mark.parametrize("unit", [b"x", "ü".encode(), "€".encode(), "🦦".encode(), b"\xff", b"\x80"])
def test_a_line_without_end_comes_in_pieces(unit: bytes) -> None:
    """Bounded, complete, and cut between characters."""
    cutter = LineCutter()
    line, pieces = b"." + unit * 50_000, []
    for begin in range(0, len(line), 1000):
        assert cutter.feed(line[begin : begin + 1000]) == b""
        if piece := cutter.take_piece():
            pieces.append(piece)
    assert max(map(len, pieces), default=0) <= follow.MAX_LINE + 1000
    assert b"".join(pieces) + cutter.flush() == line + b"\n"
    if b"\xff" not in unit and unit != b"\x80":
        assert all(piece.decode() for piece in pieces)


async def test_a_piece_says_that_its_line_continues(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_bytes(b"before\n" + b"x" * 200_000 + b" end\nafter\n")
    lines = await read_all(path)
    assert lines[0] == "before" and lines[-1] == "after"
    *pieces, last = lines[1:-1]
    assert pieces and all(piece.endswith(follow.CONTINUES) for piece in pieces)
    assert "".join(piece.removesuffix(follow.CONTINUES) for piece in pieces) + last == "x" * 200_000 + " end"


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_are_beside_it(noise: bytes) -> None:
    events = encode_events(noise + b"\n")
    shown = lines_of(events)
    assert shown == [line.removesuffix("\r") for line in noise.decode("utf-8", "replace").split("\n")]
    kept = [base64.b64decode(line[len(follow.BYTES) :]) for line in events.split(b"\n") if line.startswith(b":")]
    odd = [line for line in noise.split(b"\n") if line.decode("utf-8", "replace").encode() != line]
    assert kept == [line.removesuffix(b"\r") for line in odd]


async def test_last_lines_and_an_unfinished_one(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_text("".join(f"line {number}\n" for number in range(20_000)) + "half")
    assert await read_all(path, 3) == ["line 19998", "line 19999", "half"]
    assert await read_all(path, 0) == []
    assert len(await read_all(path, 20_000)) == 20_000
    assert len(await read_all(path, 50_000)) == 20_001


async def test_tail_reaches_into_the_rotated_file(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    (tmp_path / "app.log.1").write_text("a\nb\nc\n")
    path.write_text("d\n")
    assert await read_all(path, 3) == ["b", "c", "d"]
    assert await read_all(path, 1) == ["d"]
    assert await read_all(path, 9) == ["a", "b", "c", "d"]


async def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await LogStream.open(str(tmp_path / "app.log"), Lines(tail=1, follow=True))


async def test_without_follow_a_busy_writer_does_not_keep_us(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_text("one\n")
    stream = await LogStream.open(str(path), Lines(tail=10))
    with path.open("a") as log:
        log.write("later\n")
    assert [line async for chunk in stream for line in lines_of(chunk)] == ["one"]


@pytest.fixture(params=["inotify", "polling"])
def notified_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of waiting: with inotify, and when the kernel gives us no more of it."""
    if request.param == "polling":

        class NoInotify:
            def inotify_init1(self, flags: int) -> int:
                ctypes.set_errno(errno.EMFILE)
                return -1

        monkeypatch.setattr(inotify, "_libc", NoInotify())
    return str(request.param)


async def test_follow_new_lines(tmp_path: Path, nursery: trio.Nursery, notified_by: str) -> None:
    path = tmp_path / "app.log"
    path.write_text("old\n")
    collector = Collector()
    await nursery.start(collector.run, path, 1)
    with path.open("a", buffering=1) as log:
        for number in range(5):
            log.write(f"new {number}\n")
            await collector.wait_line(f"new {number}")
        log.write("first half, ")
        log.flush()
        log.write("second half\n")
        await collector.wait_line("first half, second half")
    assert collector.lines == ["old", *(f"new {number}" for number in range(5)), "first half, second half"]
    nursery.cancel_scope.cancel()


async def test_follow_across_truncation(tmp_path: Path, nursery: trio.Nursery, notified_by: str) -> None:
    path = tmp_path / "app.log"
    path.write_text("a long line before\nhalf")
    collector = Collector()
    await nursery.start(collector.run, path, 10)
    await collector.wait_line("a long line before")
    os.truncate(path, 0)
    await collector.wait_line("half")
    with path.open("a") as log:
        log.write("after\n")
    await collector.wait_line("after")
    assert collector.lines == ["a long line before", "half", "after"]
    nursery.cancel_scope.cancel()


async def test_follow_across_rename(tmp_path: Path, nursery: trio.Nursery, notified_by: str) -> None:
    path = tmp_path / "app.log"
    path.write_text("one\n")
    collector = Collector()
    await nursery.start(collector.run, path, 10)
    for turn in range(4):
        with path.open("a") as log:
            log.write(f"before {turn}\n")
            path.rename(tmp_path / "app.log.1")
            log.write(f"last words {turn}\n")
        path.write_text(f"after {turn}\n")
        await collector.wait_line(f"after {turn}")
    wanted = [f"{what} {turn}" for turn in range(4) for what in ("before", "last words", "after")]
    assert collector.lines == ["one", *wanted]
    nursery.cancel_scope.cancel()


async def test_follow_ends_with_the_instance(tmp_path: Path, nursery: trio.Nursery, notified_by: str) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    path = directory / "app.log"
    path.write_text("one\nlast words")
    collector = Collector()
    await nursery.start(collector.run, path, 10)
    await collector.wait_line("one")
    path.unlink()
    directory.rmdir()
    await collector.wait_for(lambda: collector.ended)
    assert collector.lines == ["one", "last words"]


async def test_followers_leave_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_text("one\n")
    before = len(os.listdir("/proc/self/fd"))
    for tail in range(20):
        stream = await LogStream.open(str(path), Lines(tail=tail, follow=True))
        if tail:
            await stream.__anext__()
        await stream.aclose()
        await stream.aclose()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_many_followers_of_a_busy_log(tmp_path: Path, nursery: trio.Nursery) -> None:
    """24 followers, rotation in between: each sees every line once, in order."""
    path = tmp_path / "app.log"
    path.write_text("")
    collectors = [Collector() for _ in range(24)]
    for collector in collectors:
        await nursery.start(collector.run, path)
    for turn in range(3):
        with path.open("a") as log:
            for number in range(2000):
                log.write(f"{turn}/{number}\n")
        for collector in collectors:
            await collector.wait_line(f"{turn}/1999")
        path.rename(tmp_path / "app.log.1")
        path.write_text("")
    for collector in collectors:
        assert collector.lines == [f"{turn}/{number}" for turn in range(3) for number in range(2000)]
    nursery.cancel_scope.cancel()


async def test_it_continues_after_any_line(tmp_path: Path) -> None:
    """Wherever it ended, in whatever file that line is now; a position that is nowhere gives all that is left."""
    path = tmp_path / "app.log"
    lines = ["one", "", "zwölf", "x" * 300, "\r", "last"]
    path.write_bytes(("\n".join(lines)).encode() + b"\n")
    every = await placed(path)
    assert [line for _, line in every] == ["one", "", "zwölf", "x" * 300, "", "last"]
    for count, (position, _) in enumerate(every, 1):
        assert await placed(path, after=position) == every[count:]
    path.rename(f"{path}.1")
    path.write_text("new\n")
    assert [line for _, line in await placed(path, after=every[3][0])] == ["", "last", "new"]
    path.rename(f"{path}.1")
    path.write_text("newer\n")
    assert [line for _, line in await placed(path, after=every[3][0])] == ["new", "newer"]
    for wrong in ("1-2", "1-2-x", "1-2--3", "9" * 30 + "-1-1"):
        with pytest.raises(InvalidRequest):
            await placed(path, after=wrong)


# ── Times and runs ──────────────────────────────────────────────────────────────────────────────


def second(number: int) -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)


class TimedLog:
    """A log whose lines are written at chosen seconds; a server looks at it after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._times = LogTimes()

    def write(self, text: str, number: int, *, unseen: bool = False) -> None:
        with self.path.open("a") as file:
            file.write(text)
        os.utime(self.path, (second(number).timestamp(),) * 2)
        if not unseen:
            self._times.note([self.path])

    def rotate(self) -> None:
        old = self.path.rename(f"{self.path}.1")
        move_times(self.path, old)

    async def read(self, **wanted: Any) -> list[str]:
        """``second line`` for each."""
        stream = await LogStream.open(str(self.path), Lines(**{"tail": 100, "times": True, **wanted}))
        events = b"".join([chunk async for chunk in stream]).decode().split("\n\n")[:-1]
        found = []
        for event in events:
            time, *_, data = [each for each in event.split("\n") if not each.startswith("id: ")]
            since = datetime.fromisoformat(time.removeprefix(": time=")) - second(0)
            found.append(f"{since.total_seconds():g} {json.loads(data[6:])}")
        return found


@pytest.fixture
def timed(tmp_path: Path) -> TimedLog:
    log = TimedLog(tmp_path / "app.log")
    log.write("one\ntwo\nha", 10)
    log.write("lf\n", 20)
    log.write("last\n", 30, unseen=True)
    return log


async def test_lines_have_the_time_of_the_look_after_them(timed: TimedLog) -> None:
    assert await timed.read() == ["10 one", "10 two", "20 half", "30 last"]
    assert await timed.read(tail=1) == ["30 last"]
    timed.rotate()
    timed.write("new\n", 40)
    assert await timed.read() == ["10 one", "10 two", "20 half", "30 last", "40 new"]


@pytest.mark.parametrize(
    ("since", "lines"),
    [(0, ["one", "two", "half", "last"]), (10, ["one", "two", "half", "last"]), (11, ["half", "last"]),
     (20, ["half", "last"]), (21, ["last"]), (30, ["last"]), (31, [])],
)  # fmt: skip
async def test_since(timed: TimedLog, since: int, lines: list[str]) -> None:
    """A line that was begun before and ended after is shown whole; ``tail`` counts as well."""
    assert [line.split()[1] for line in await timed.read(since=second(since))] == lines
    assert [line.split()[1] for line in await timed.read(since=second(since), tail=1)] == lines[-1:]


@pytest.mark.parametrize(("since", "lines"), [(20, ["half", "last", "new"]), (31, ["new"]), (40, ["new"]), (41, [])])
async def test_since_reaches_into_the_rotated_file(timed: TimedLog, since: int, lines: list[str]) -> None:
    timed.rotate()
    timed.write("new\n", 40)
    assert [line.split()[1] for line in await timed.read(since=second(since))] == lines


async def test_runs(timed: TimedLog) -> None:
    """Wherever they begin: in a line, or in the rotated file."""
    assert [line.split()[1] for line in await timed.read(run=LogRun.CURRENT)] == ["one", "two", "half", "last"]
    with pytest.raises(NotFound):
        await timed.read(run=LogRun.PREVIOUS)
    timed.write("torn", 40)
    begin_run(timed.path)
    timed.write("second\n", 50)
    assert await timed.read(run=LogRun.CURRENT) == ["50 second"]
    assert (await timed.read(run=LogRun.PREVIOUS))[-1].endswith(" torn")
    assert [line.split()[1] for line in await timed.read(run=LogRun.PREVIOUS, tail=2)] == ["last", "torn"]
    timed.rotate()
    timed.write("more\n", 60)
    assert [line.split()[1] for line in await timed.read(run=LogRun.CURRENT)] == ["second", "more"]
    begin_run(timed.path)
    timed.write("third\n", 70)
    assert await timed.read(run=LogRun.CURRENT) == ["70 third"]
    assert [line.split()[1] for line in await timed.read(run=LogRun.PREVIOUS, follow=True)] == ["second", "more"]
    assert [line.split()[1] for line in await timed.read(run=LogRun.PREVIOUS, tail=1)] == ["more"]


async def test_a_run_that_ended_before_since(timed: TimedLog) -> None:
    """It has nothing of that time, also where the next one began in the rotated file."""
    begin_run(timed.path)
    timed.write("second\n", 50)
    wanted = {"run": LogRun.PREVIOUS, "since": second(49)}
    assert await timed.read(**wanted) == []
    timed.rotate()
    timed.write("more\n", 60)
    assert await timed.read(**wanted) == []
    assert await timed.read(run=LogRun.PREVIOUS, since=second(55)) == []
    begin_run(timed.path)
    timed.write("third\n", 70)
    assert await timed.read(run=LogRun.CURRENT, since=second(71)) == []


async def test_a_file_that_is_rotated_while_it_is_opened_is_read_once(
    timed: TimedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = follow._Page.open

    def rotate_after(path: str) -> follow._Page:
        page = opened(path)
        if path == str(timed.path):
            timed.rotate()
        return page

    monkeypatch.setattr(follow._Page, "open", rotate_after)
    assert await timed.read() == ["10 one", "10 two", "20 half", "30 last"]


async def test_a_follower_does_not_hold_the_times_of_what_it_has_read(timed: TimedLog, nursery: trio.Nursery) -> None:
    """There may be 65,536, for each follower."""
    stream = await LogStream.open(str(timed.path), Lines(tail=100, times=True, follow=True))

    async def write_at_the_end() -> None:
        while not stream._caught_up:
            await trio.sleep(0.001)
        timed.write("new\n", 40)

    held = stream._times
    assert held is not None and held.marks
    nursery.start_soon(write_at_the_end)
    with trio.fail_after(10):
        received = await anext(stream)
        while b"new" not in received:
            received = await anext(stream)
    assert b": time=2026-01-01T00:00:40" in received
    held = stream._times
    assert held is not None and not held.marks
    stream.close()


async def test_a_follower_has_times_as_well(tmp_path: Path, nursery: trio.Nursery) -> None:
    log = TimedLog(tmp_path / "app.log")
    log.write("one\n", 10)
    stream = await LogStream.open(str(log.path), Lines(tail=1, follow=True, times=True))
    assert b": time=2026-01-01T00:00:10.000000000Z\n" in await stream.__anext__()
    log.write("two\n", 20)
    assert b": time=2026-01-01T00:00:20.000000000Z\n" in await stream.__anext__()
    log.rotate()
    log.write("three\n", 30)
    assert b": time=2026-01-01T00:00:30.000000000Z\n" in await stream.__anext__()
    await stream.aclose()


async def placed(path: Path, after: str = "") -> list[tuple[str, str]]:
    stream = await LogStream.open(str(path), Lines(tail=100, positions=True, after=after))
    events = b"".join([chunk async for chunk in stream]).decode().split("\n\n")[:-1]
    begin, *events = events
    assert re.fullmatch(r"id: \d+-\d+-\d+", begin), "where to go on if nothing comes"
    return [
        (event.split("\n")[0].removeprefix("id: "), msgspec.json.decode(event.split("data: ")[-1])) for event in events
    ]
