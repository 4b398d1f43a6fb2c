"""Access below /sys under a time limit."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio

from hypeman.host.files import HostError
from hypeman.host.sysfs import HostStuck, Sysfs


async def test_reads_and_writes(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    (tmp_path / "file").write_text("before\n")
    (tmp_path / "link").symlink_to("../a/b/target")
    await sysfs.write("file", "x", subject="s")
    assert await sysfs.read("file", subject="s") == "xefore"  # sysfs does not truncate either
    assert await sysfs.read("none", subject="s") is None
    assert (sysfs.read_link("link"), sysfs.read_link("file")) == ("target", None)
    assert sysfs.exists("link")
    assert not sysfs.exists("none")


async def test_errors_name_the_path_and_the_reason(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"writing 'x' to .*/none: No such file"):
        await Sysfs(tmp_path).write("none", "x", subject="s")


async def test_a_write_that_blocks_is_abandoned_and_others_continue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A FIFO without a reader blocks as a driver does. Its subject stays refused until it came back."""
    sysfs = Sysfs(tmp_path, deadline=0.1)
    os.mkfifo(tmp_path / "unbind")
    (tmp_path / "file").touch()
    with pytest.raises(HostStuck):
        await sysfs.write("unbind", "x", subject="one")
    assert sysfs.is_busy("one")
    with pytest.raises(HostStuck, match="has not returned yet"):
        await sysfs.write("file", "x", subject="one")
    await sysfs.write("file", "x", subject="two")
    assert (tmp_path / "file").read_text() == "x"
    reader = os.open(tmp_path / "unbind", os.O_RDONLY | os.O_NONBLOCK)
    with trio.fail_after(10):
        await sysfs.wait_returned()
    os.close(reader)
    await sysfs.write("file", "y", subject="one")
    assert "has not returned for" in caplog.text
    assert "returned after" in caplog.text


async def test_more_stuck_accesses_than_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What found no thread in time never happens, and its subject is free again."""
    monkeypatch.setattr("hypeman.host.sysfs._THREADS", 2)
    sysfs = Sysfs(tmp_path, deadline=0.1)
    (tmp_path / "file").touch()
    gate = threading.Event()
    try:
        for number in range(2):
            with trio.fail_after(10), pytest.raises(HostStuck, match="has not returned for"):
                await sysfs.call(gate.wait, what=f"job {number}")
        with trio.fail_after(10), pytest.raises(HostStuck, match="all threads"):
            await sysfs.write("file", "late", subject="s")
        assert not sysfs.is_busy("s")
    finally:
        gate.set()
    with trio.fail_after(10):
        await sysfs.wait_returned()
    await sysfs.write("file", "x", subject="s")
    assert (tmp_path / "file").read_text() == "x"


async def test_cancellation_is_seen_before_an_access_and_never_within(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    started, gate = threading.Event(), threading.Event()
    finished = False

    def begin() -> None:
        started.set()
        gate.wait(timeout=30)

    async with trio.open_nursery() as nursery:

        async def access() -> None:
            nonlocal finished
            await sysfs.call(begin, what="job")
            finished = True
            await sysfs.call(pytest.fail, what="job after the cancellation")

        nursery.start_soon(access)
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()
        gate.set()
    assert finished
