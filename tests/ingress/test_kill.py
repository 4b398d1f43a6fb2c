"""Kill matrix: the engine at every message, while an ingress is created, used and deleted.

What was confirmed is in force in the next engine, what was deleted is not, and its port is free.
"""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import h11
import msgspec
import pytest
import trio

from hypeman.egress.front import Place
from hypeman.egress.service import Egress, Settings
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.service import Settings as CertificateSettings
from hypeman.ingress.service import Ingresses
from hypeman.ingress.types import CreateIngressRequest
from hypeman.store import Store
from tests.ingress.test_proxy import http_guest, response_of, shows_head

pytestmark = pytest.mark.slow

MESSAGES = range(3, 21)
"""After Start and Hello, without which no server starts. How many bring audit records depends on the time; beyond the
last one nothing is killed."""


def listen(port: int) -> Sequence[socket.socket]:
    """On loopback only."""
    made = socket.create_server(("127.0.0.1", port))
    made.setblocking(False)
    return [made]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def request(name: str, host: str, port: int, target: int) -> CreateIngressRequest:
    rule = {"match": {"hostname": host, "port": port}, "target": {"instance": "a", "port": target}, "tls": True}
    return msgspec.convert({"name": name, "rules": [rule]}, CreateIngressRequest)


async def ask(host: str, port: int, root: str) -> int:
    """The status; 0 if the connection fails. Tries again while an engine is replaced under the request."""
    for _ in range(3):
        with suppress(OSError, trio.BrokenResourceError, h11.RemoteProtocolError), trio.fail_after(30):
            plain = await trio.open_tcp_stream("127.0.0.1", port)
            async with trio.SSLStream(plain, ssl.create_default_context(cadata=root), server_hostname=host,
                                      https_compatible=True) as stream:  # fmt: skip
                await stream.send_all(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                return (await response_of(stream))[0].status_code
    return 0


async def life(service: Ingresses, target: int) -> None:
    """Two ingresses on a port and one on another; one of each is deleted."""
    first, second = free_port(), free_port()
    await service.create(request("one", "one.internal", first, target))
    root = await service.internal_root()
    assert await ask("one.internal", first, root) == 200
    await service.create(request("two", "two.internal", first, target))
    await service.create(request("three", "three.internal", second, target))
    for name, port in (("two", first), ("three", second), ("one", first)):
        assert await ask(f"{name}.internal", port, root) == 200, name
    await service.delete("two")
    await service.delete("three")
    assert await ask("two.internal", first, root) == 0, "it has no certificate any more"
    assert await ask("one.internal", first, root) == 200
    listen(second)[0].close()


@pytest.mark.parametrize("number", MESSAGES)
async def test_the_engine_is_killed_at_a_message(tmp_path: Path, number: int) -> None:
    started: list[int] = []

    def command(fd: int) -> list[str]:
        started.append(fd)
        return [sys.executable, "-m", "tests.egress.killed", "engine", str(number if len(started) == 1 else 0), str(fd)]

    store = Store.open(tmp_path / "store")
    async with store.serving(), trio.open_nursery() as nursery:
        guests = await nursery.start(trio.serve_tcp, http_guest(shows_head), 0)
        target = guests[0].socket.getsockname()[1]
        egress = Egress(Settings(address="127.0.0.1", port=0, loops=1), tmp_path / "egress", command=command)
        service = Ingresses(
            store,
            egress.front,
            find=str,
            place_of=lambda _: Place("127.0.0.1", exists=True),
            certificates=Certificates(CertificateSettings(), tmp_path / "ingress", store),
            listen=listen,
        )
        with trio.fail_after(100):
            await nursery.start(partial(egress.run, grace=0))
            await nursery.start(service.run)
            await egress.accept()
            await life(service, target)
        nursery.cancel_scope.cancel()
    store.close()
    assert len(started) == 2 or number == MESSAGES[-1]
