"""Requests over a unix socket: what is sent, what is made of answers, and what of no answers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from hypeman.hypervisor.interface import VmmBroken, VmmGone
from hypeman.hypervisor.unix_http import ApiRefused, UnixHttp


class Server:
    """Takes one connection after the other; sends the prepared answer in pieces and keeps the request."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.answer = b""
        self.pieces: Callable[[bytes], list[bytes]] = lambda answer: [answer]
        self.got = b""
        self.fds: list[int] = []

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        listener = trio.socket.socket(socket.AF_UNIX)
        with listener:
            await listener.bind(self.path)
            listener.listen()
            task_status.started()
            while True:
                connection, _ = await listener.accept()
                with connection:
                    self.got, ancillary, _, _ = await connection.recvmsg(65536, 1024)
                    self.fds = [fd for _, _, data in ancillary for fd in memoryview(data).cast("i")]
                    for piece in self.pieces(self.answer):
                        await connection.send(piece)
                        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
async def server(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Server]:
    made = Server(str(tmp_path / "s"))
    await nursery.start(made.run)
    yield made


def answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_a_request_and_its_answer(server: Server) -> None:
    server.answer = answer(b'{"state": "Running"}')
    http = UnixHttp(server.path)
    assert await http.request("PUT", "/vm", {"a": 1}) == {"state": "Running"}
    head, _, body = server.got.partition(b"\r\n\r\n")
    assert head.startswith(b"PUT /vm HTTP/1.1\r\n") and b"Content-Length: 7" in head
    assert json.loads(body) == {"a": 1}
    server.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
    assert await http.request("PUT", "/vm.boot") is None
    assert b"Content-Length: 0" in server.got


async def test_an_answer_in_single_bytes(server: Server) -> None:
    server.answer = answer(b'[1, "two"]')
    server.pieces = lambda answer: [answer[n : n + 1] for n in range(len(answer))]
    assert await UnixHttp(server.path).request("GET", "/") == [1, "two"]


async def test_descriptors_travel_with_the_request(server: Server) -> None:
    server.answer = answer(b"")
    read, write = os.pipe()
    await UnixHttp(server.path).request("PUT", "/net", {}, fds=[write])
    assert len(server.fds) == 1
    os.write(server.fds[0], b"through")
    assert os.read(read, 100) == b"through"
    for fd in (read, write, *server.fds):
        os.close(fd)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'["Error from API", "VM is not created"]', "Error from API: VM is not created"),
        (b'{"fault_message": "no such drive"}', "no such drive"),
        (b"plain words", "plain words"),
        (b"", "without a word"),
    ],
)
async def test_a_refusal_has_the_vmms_message(server: Server, body: bytes, said: str) -> None:
    server.answer = answer(body, "400 Bad Request")
    with pytest.raises(ApiRefused, match=said) as caught:
        await UnixHttp(server.path).request("PUT", "/drives/x", {})
    assert caught.value.answered == 400 and caught.value.status == 500


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hello\r\n\r\n",
        b"",
        answer(b"not json"),
        answer(b'"\xff"'),
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000,
        answer(b"[" + b"1," * 3_000_000 + b"1]"),
    ],
    ids=["no HTTP", "nothing", "no JSON", "no text", "cut", "endless head", "endless body"],
)
async def test_a_malformed_answer_is_an_error(server: Server, nonsense: bytes) -> None:
    server.answer = nonsense
    with trio.fail_after(30), pytest.raises((VmmBroken, VmmGone)):
        await UnixHttp(server.path).request("GET", "/")


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(VmmGone):
        await UnixHttp(str(tmp_path / "none")).request("GET", "/")


async def test_no_answer_in_time(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        with pytest.raises(VmmBroken, match="did not answer GET / within 5 s"):
            await UnixHttp(str(tmp_path / "s")).request("GET", "/", timeout=5)
