"""Words for systemd, and sockets that it keeps."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypeman.host import notify as module
from hypeman.host.notify import keep_sockets, notify, take_kept_sockets


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Its end of the socket of notifications."""
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        yield sock


def test_ready(systemd: socket.socket, tmp_path: Path) -> None:
    notify()
    assert systemd.recv(100) == b"READY=1"
    (tmp_path / "notify").unlink()
    notify()  # a message that cannot be sent is no reason to stop


def test_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify()


def test_sockets_are_kept_and_given_back(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        keep_sockets("egress", [listener])
    assert systemd.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=egress"
    message, descriptors, _, _ = socket.recv_fds(systemd, 100, 4)
    assert message == b"FDSTORE=1\nFDNAME=egress"
    (descriptor,) = descriptors
    monkeypatch.setattr(module, "_FIRST", descriptor)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "egress", "HOME": "/"}
    (kept,) = take_kept_sockets(environ)["egress"]
    with kept, socket.create_connection(address):  # it went on listening
        assert kept.getsockname() == address
        assert not kept.get_inheritable()
        kept.accept()[0].close()
    assert environ == {"HOME": "/"}


def test_what_is_not_for_us_or_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "egress"}
    assert take_kept_sockets(other) == {} and other == {}
    assert take_kept_sockets({}) == {}
    reader, writer = os.pipe()
    os.close(writer)
    monkeypatch.setattr(module, "_FIRST", reader)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "stored"}
    assert take_kept_sockets(environ) == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
