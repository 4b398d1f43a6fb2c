"""What a login to a database costs the engine, against a request of HTTPS on a new connection: CPU time of its process.

Guest and servers are those of the tests. Both sides are TLS with Postgres and HTTPS; a guest of MySQL connects in
clear, as its clients may, and the server is shown the password over TLS.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
import trio.from_thread
import trustme

from tests.bench.harness import Result, compare, cpu_of_tasks
from tests.egress.conftest import Origin, Wire
from tests.egress.mysql_peers import NATIVE, SHA2, Told
from tests.egress.mysql_peers import Client as MysqlClient
from tests.egress.mysql_peers import Server as MysqlServer
from tests.egress.postgres_peers import SSL_REQUEST, startup
from tests.egress.postgres_peers import Client as PostgresClient
from tests.egress.postgres_peers import Server as PostgresServer

ROOT = Path(__file__).parents[2]
HOST = "db.example.com"
PASSWORD = "a-password-of-some-length"
LOGINS = 100

FORMS: dict[str, dict[str, Any]] = {
    "https": {"header": "Authorization", "format": "Bearer ${value}"},
    "postgres": {"postgres": {"user": "app"}},
    "mysql, caching_sha2_password": {"mysql": {"user": "app"}},
    "mysql, mysql_native_password": {"mysql": {"user": "app"}},
}


class Peer:
    """An engine of its own with a server behind it, and how a guest uses it once."""

    def __init__(self, name: str, directory: Path, ca: trustme.CA) -> None:
        self.name, self.dir = name, directory
        self.pid = self.port = self.origin = 0
        self.trust = ssl.create_default_context()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        leaf = ca.issue_cert(HOST, key_type=trustme.KeyType.ECDSA)
        leaf.configure_cert(self.context)
        self.certificate = ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())

    async def serve(self, stream: trio.SocketStream) -> None:
        if self.name == "postgres":
            await PostgresServer(PASSWORD, self.context, self.certificate).serve(stream)
        elif self.name == "https":
            await Origin().serve(trio.SSLStream(stream, self.context, server_side=True, https_compatible=True))
        else:
            server = MysqlServer(PASSWORD, self.context)
            server.plugin = server.account = NATIVE if NATIVE in self.name else SHA2
            await server.serve(stream)

    def start(self, port: int) -> subprocess.Popen[str]:
        self.origin = port
        told = {
            "settings": {"address": "127.0.0.1", "port": 0, "loops": 1, "allow": ["127.0.0.0/8"],
                         "trust_file": str(self.dir / "ca.pem"), "assumed_tls_port": port,
                         "limits": {"mints_per_second": 0, "requests_per_second": 0}},
            "directory": str(self.dir / self.name), "names": {HOST: ["127.0.0.1"]},
            "policies": [["inst-a", "127.0.0.1", {"KEY": {"source": {"env": "K"}, "inject": [
                {"hosts": [HOST], "ports": [port], "as": FORMS[self.name]}]}}, {"K": PASSWORD}]],
        }  # fmt: skip
        argv = [sys.executable, "-m", "tests.egress.proxy_process", json.dumps(told)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        self.pid, self.port = ready["pid"], ready["port"]
        self.trust.load_verify_locations(cadata=ready["ca"])
        return process

    async def _tls(self, stream: trio.abc.Stream) -> trio.SSLStream[trio.abc.Stream]:
        return trio.SSLStream(stream, self.trust, server_hostname=HOST, https_compatible=True)

    async def use(self) -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        wire = Wire(stream)
        if self.name == "https":
            wire = Wire(await self._tls(stream))
            await wire.send(f"GET /1k HTTP/1.1\r\nHost: {HOST}:{self.origin}\r\nConnection: close\r\n\r\n".encode())
            assert b" 200 " in await wire.rest()
        elif self.name == "postgres":
            await wire.send(SSL_REQUEST)
            assert await wire.exactly(1) == b"S"
            client = PostgresClient(Wire(await self._tls(stream)))
            assert await client.log_in("mock-KEY", startup(user="app")) == {}
            wire = client.wire
        else:
            guest = MysqlClient(wire)
            assert await guest.greeted() == Told() and await guest.log_in("mock-KEY") == Told()
        await trio.aclose_forcefully(wire.stream)


@asynccontextmanager
async def peers() -> AsyncGenerator[dict[str, Peer]]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        ca.cert_pem.write_to_path(str(directory / "ca.pem"))
        made = {form: Peer(form, directory, ca) for form in FORMS}
        processes: list[subprocess.Popen[str]] = []
        async with trio.open_nursery() as nursery:
            try:
                for peer in made.values():
                    serve = partial(trio.serve_tcp, peer.serve, 0, host="127.0.0.1")
                    listeners = await nursery.start(serve)
                    port = listeners[0].socket.getsockname()[1]
                    processes.append(await trio.to_thread.run_sync(peer.start, port))
                yield made
            finally:
                for process in processes:
                    assert process.stdin is not None
                    process.stdin.close()
                    process.wait(20)
                nursery.cancel_scope.cancel()


async def measure_all() -> list[Result]:
    async with peers() as made:

        def measured(peer: Peer) -> Callable[[], float]:
            async def all_of_them() -> None:
                for _ in range(LOGINS):
                    await peer.use()

            def measure() -> float:
                before = cpu_of_tasks(peer.pid)
                use: Callable[[], Awaitable[None]] = all_of_them
                trio.from_thread.run(use)
                return (cpu_of_tasks(peer.pid) - before) * 1e6 / LOGINS

            return measure

        plain = measured(made["https"])
        return [
            await trio.to_thread.run_sync(
                partial(compare, f"egress, login, {name}", "µs CPU", measured(peer), "HTTPS, new connection", plain)
            )
            for name, peer in made.items()
            if name != "https"
        ]


def run() -> list[Result]:
    return trio.run(measure_all)
