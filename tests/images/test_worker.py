"""The worker process: what it gives up, and that it never outlives its server."""

from __future__ import annotations

import array
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from hypeman.images import worker
from tests.images.conftest import need_root
from tests.images.layout import entry, sha256, tar


@contextmanager
def running(tmp_path: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A worker that was started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        worker.argv(theirs.fileno()), pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": root}
    )
    theirs.close()
    ours.settimeout(20)
    try:
        files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("disk", "scratch")]
        send(ours, worker.Begin(1 << 50, 1000, "00" * 16), files)
        yield ours, process
    finally:
        ours.close()
        assert process.wait(20) is not None


def send(link: socket.socket, message: worker.Request, files: list[int]) -> None:
    link.sendmsg([msgspec.json.encode(message)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])


def test_ends_with_its_server(tmp_path: Path) -> None:
    """Even in the middle of a layer that never ends."""
    with running(tmp_path) as (link, process):
        endless = os.open(tmp_path / "endless", os.O_RDWR | os.O_CREAT)
        os.ftruncate(endless, 1 << 42)
        send(link, worker.Layer("layer", sha256(b"")), [endless])
        assert b"Progress" in link.recv(worker.MAX_MESSAGE)
        link.close()
        assert process.wait(20) == 1


def test_has_no_rights(tmp_path: Path) -> None:
    """After the first layer it is nobody, cannot become another user, and has no network."""
    need_root()
    layer = tar(entry("x", data=b"x"))
    (tmp_path / "layer").write_bytes(layer)
    with running(tmp_path) as (link, process):
        fd = os.open(tmp_path / "layer", os.O_RDONLY)
        send(link, worker.Layer("layer", sha256(layer)), [fd])
        assert b"Applied" in link.recv(worker.MAX_MESSAGE)
        status = Path(f"/proc/{process.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(fields["Uid"].split()) == {"65534"} and fields["Groups"].strip() == ""
        assert fields["NoNewPrivs"] == "1" and int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
        network = os.readlink(f"/proc/{process.pid}/ns/net")
        assert network != os.readlink("/proc/self/ns/net")
        send(link, worker.Finish(), [])
        assert b"Done" in link.recv(worker.MAX_MESSAGE)
        assert process.wait(20) == 0


@pytest.mark.parametrize("first", [worker.Finish(), worker.Layer("d", "d")])
def test_wrong_order(first: worker.Request, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = str(Path(__file__).parents[2])
    with ours, theirs:
        process = subprocess.Popen(
            worker.argv(theirs.fileno()), pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": root}
        )
        theirs.close()
        ours.settimeout(20)
        send(ours, first, [])
        assert b"Failed" in ours.recv(worker.MAX_MESSAGE)
        assert process.wait(20) == 1
