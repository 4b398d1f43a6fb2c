"""Ingresses as the server runs them: store, ports of the host, the engine, and a guest behind a cable."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.egress.front import Place
from hypeman.egress.link import end_engines
from hypeman.egress.service import Egress, Settings
from hypeman.errors import AlreadyExists, Conflict, InvalidRequest, NotFound, PortInUse
from hypeman.events.log import EVENTS
from hypeman.ingress.certificates.acme import Pace
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.service import Settings as CertificateSettings
from hypeman.ingress.service import Ingresses
from hypeman.ingress.types import CertificateState, CreateIngressRequest, Ingress
from hypeman.store import Store
from tests.ingress.certs import write_pair
from tests.network.hosts import guest_host, world_host
from tests.network.lab import HOST, Lab, in_namespace, sh

UID = 575535


def request(
    name: str, hostname: str, instance: str = "web", port: int = 80, target_port: int = 8000, **more: bool
) -> CreateIngressRequest:
    target = {"instance": instance, "port": target_port}
    rule = {"match": {"hostname": hostname, "port": port}, "target": target, **more}
    return msgspec.convert({"name": name, "rules": [rule]}, CreateIngressRequest)


def find(ref: str) -> str:
    if ref != "web":
        raise NotFound(f"no instance {ref!r}")
    return ref


def make_folder() -> Path:
    """Removed when the test's process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_free(port: int) -> bool:
    """Whether nothing listens there; past connections in TIME_WAIT do not count."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


class Server:
    """A server's part, on the store in ``folder``."""

    def __init__(self, service: Ingresses, egress: Egress) -> None:
        self.service = service
        self.egress = egress


@asynccontextmanager
async def server(
    folder: Path,
    address: str,
    files: CertificateSettings | None = None,
    pace: Pace | None = None,
    **changes: object,
) -> AsyncIterator[Server]:
    store = Store.open(folder / "store")

    def place_of(name: str) -> Place:
        return Place(address if name == "web" else "", exists=name in ("web", "down"))

    settings = Settings(address="127.0.0.1", port=18080, loops=2, uid=UID)
    async with store.serving(), trio.open_nursery() as nursery:
        egress = Egress(msgspec.structs.replace(settings, **changes), folder / "egress", engines=folder / "engines")
        certificates = Certificates(files or CertificateSettings(), folder / "ingress", store, interval=0.05, pace=pace)
        service = Ingresses(store, egress.front, find=find, place_of=place_of, certificates=certificates)
        await nursery.start(egress.run)
        await nursery.start(service.run)
        await egress.accept()
        try:
            yield Server(service, egress)
        finally:
            nursery.cancel_scope.cancel()
    store.close()


@asynccontextmanager
async def ingresses(
    folder: Path, address: str, settings: CertificateSettings, pace: Pace | None = None
) -> AsyncIterator[Ingresses]:
    """The same, with an engine that ends with it."""
    try:
        async with server(folder, address, settings, pace) as here:
            yield here.service
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(20):
            await end_engines(folder / "engines")


def serve_http(server: socket.socket) -> None:
    """Answers each connection once, with who asked."""
    while True:
        try:
            accepted, _ = server.accept()
        except OSError:
            return
        with accepted:
            head = accepted.recv(65536)
            who = next(line for line in head.split(b"\r\n") if line.startswith(b"X-Forwarded-For:"))
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(who), who))


def curl(host: str, address: str = "127.0.0.1", port: int = 80) -> str:
    return sh(f"curl -sS -m 60 -w ' %{{http_code}}' -H 'Host: {host}' http://{address}:{port}/").strip()


async def ask(host: str, **more: object) -> str:
    return await trio.to_thread.run_sync(lambda: curl(host, **more))  # type: ignore[arg-type]


@in_namespace
async def test_from_the_world_to_a_guest_and_through_restarts(lab: Lab) -> None:
    guest = await lab.guest()
    folder = make_folder()
    with guest_host(guest) as inside, world_host(lab) as world, inside.serve(8000) as server_socket:
        server_socket.settimeout(None)
        async with trio.open_nursery() as nursery:
            # A thread in accept() cannot be cancelled: it must not hide why the test fails.
            nursery.start_soon(partial(trio.to_thread.run_sync, serve_http, server_socket, abandon_on_cancel=True))
            async with server(folder, guest.lease.ipv4) as first:
                service, egress = first.service, first.egress
                made = await service.create(request("site", "Web.Example.com"))
                assert (await service.get("site"), await service.get(made.id[:9])) == (made, made)
                assert await ask("web.example.com") == "X-Forwarded-For: 127.0.0.1 200"
                seen = await trio.to_thread.run_sync(
                    world.sh, f"curl -sS -m 60 -H 'Host: web.example.com' http://{HOST}/"
                )
                assert seen.strip() == "X-Forwarded-For: 192.0.2.2"
                assert (await ask("other.example.com")).endswith(" 404")
                await service.create(request("all", "{name}.all.test", "{name}"))
                assert (await ask("web.all.test")).endswith(" 200")
                assert (await ask("down.all.test")).endswith(" 503")

                for refused, code in [
                    (request("site", "new.example.com"), "already_exists"),
                    (request("twice", "WEB.example.com"), "hostname_in_use"),
                    (request("twice", "{other}.all.test", "{other}"), "hostname_in_use"),
                ]:
                    try:
                        await service.create(refused)
                    except (AlreadyExists, Conflict) as error:
                        assert error.code == code
                    else:
                        raise AssertionError(f"{refused.name} was taken")

                with trio.fail_after(30):  # what an engine that is killed has not reported is lost
                    while service.requests["site", "2xx"] < 2:
                        await trio.sleep(0.05)
                before = egress.engine_pid
                os.kill(before, signal.SIGKILL)
                assert (await ask("web.example.com")).endswith(" 200"), "connections wait for the next engine"
                with trio.fail_after(60):  # it may answer before the server has heard that it is ready
                    while egress.engine_pid in (0, before):
                        await trio.sleep(0.05)
                before = egress.engine_pid

            assert (await ask("web.example.com")).endswith(" 200"), "the engine goes on without a server"
            async with server(folder, guest.lease.ipv4) as second:
                assert second.egress.engine_pid == before
                assert (await ask("web.example.com")).endswith(" 200"), "the next server has the rules"
                await second.service.delete("site")
                assert (await ask("web.example.com")).endswith(" 404")

            async with server(folder, guest.lease.ipv4, drain_timeout=0, loops=1, port=18081) as third:
                assert third.egress.engine_pid != before, "another engine takes over the sockets"
                for _ in range(5):
                    assert (await ask("web.all.test")).endswith(" 200")
                await third.service.delete("all")
                with trio.fail_after(30):  # the engine closes its copy of the listening socket a moment later
                    while not is_free(80):
                        await trio.sleep(0.02)
                store = third.service._store
                types = store.read(lambda txn: [event.type for _, event in txn.scan(EVENTS)])
                assert types == ["ingress.created"] * 2 + ["ingress.deleted"] * 2
            await end_engines(folder / "engines")
            server_socket.shutdown(socket.SHUT_RDWR)


@in_namespace
async def test_a_port_of_another_program(lab: Lab) -> None:
    folder = make_folder()
    async with server(folder, "127.0.0.1") as here:
        service = here.service
        with socket.socket() as other:
            other.bind(("127.0.0.1", 81))
            other.listen()
            try:
                await service.create(request("site", "a.b", port=81))
            except PortInUse as error:
                assert error.code == "port_in_use"
                assert f"(process {os.getpid()})" in error.message
            else:
                raise AssertionError("the port was taken")
            assert await service.list(tags={}) == []
        made: Ingress = await service.create(request("site", "a.b", port=81))
        assert await service.list(tags={}) == [made]
        assert (await ask("c.d", port=81)).endswith(" 404"), "it serves"
        copies = await here.egress.front.inherited(81)  # as an engine has them that closes its own a moment later
        await service.delete("site")
        assert copies
        await service.create(request("again", "a.b", port=81))
        for copy in copies:
            copy.close()
        assert (await ask("c.d", port=81)).endswith(" 404")
        await service.delete("again")
    await end_engines(folder / "engines")


def secure_curl(url: str, root: str, *more: str) -> str:
    """Page, status and redirect."""
    name, _, port = url.partition("//")[2].partition("/")[0].partition(":")
    command = f"curl -sS -m 60 -w ' %{{http_code}} %{{redirect_url}}' --cacert {root} {' '.join(more)}"
    return sh(f"{command} --connect-to {name}:{port}:127.0.0.1:{port} {url}").strip()


@in_namespace
async def test_tls_with_curl_and_the_confined_engine(lab: Lab) -> None:
    folder = make_folder()
    root = folder / "root.pem"
    paths = write_pair(folder, "web.example.com")
    settings = CertificateSettings(files={"site": paths})

    async def ask_secure(url: str, *more: str, trust: Path = root) -> str:
        return await trio.to_thread.run_sync(lambda: secure_curl(url, str(trust), *more))

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            head = await stream.receive_some(65536)
            who = next(line for line in head.split(b"\r\n") if line.startswith(b"X-Forwarded-Proto:"))
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(who), who))

    (guests,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = guests.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [guests])
        async with server(folder, "127.0.0.1", settings) as here:
            service = here.service
            root.write_text(await service.internal_root())
            for name, hostname in [("one", "web.internal"), ("two", "{x}.vm.internal"), ("three", "web.example.com")]:
                instance = "{x}" if "{" in hostname else "web"
                wanted = request(name, hostname, instance, port=443, target_port=port, tls=True, redirect_http=True)
                made = await service.create(wanted)
                assert made.certificates
                assert made.certificates[0].state is CertificateState.VALID
            assert service._records[made.id].ports == {80, 443}
            expected = "X-Forwarded-Proto: https 200"
            for more in ("--tlsv1.3", "--tls-max 1.2", "--http1.1"):
                assert await ask_secure("https://web.internal:443/", more) == expected
            assert await ask_secure("https://web.vm.internal:443/") == expected
            assert await ask_secure("https://web.example.com:443/", trust=paths[0]) == expected
            moved = await ask_secure("http://web.internal:80/x?y=1")
            assert moved.endswith("308 https://web.internal/x?y=1")

            try:
                await service.create(request("four", "web.internal", port=80))
            except Conflict as error:
                assert error.code == "hostname_in_use", "the redirect has the port"
            else:
                raise AssertionError("two answers for one address")
            try:
                await service.create(request("four", "x.example.com", port=443, tls=True))
            except InvalidRequest as error:
                assert error.code == "config_validation_failed"
            else:
                raise AssertionError("there is no certificate for it")

            before = here.egress.engine_pid
            os.kill(before, signal.SIGKILL)
            assert await ask_secure("https://web.internal:443/") == expected, "the next engine has the certificates"
            asked: list[str] = []
            is_over = False

            async def ask_often() -> None:
                while not is_over:
                    asked.append(await ask_secure("https://web.example.com:443/", "-k"))

            async with trio.open_nursery() as clients:
                clients.start_soon(ask_often)
                clients.start_soon(ask_often)
                for days in range(40, 45):
                    write_pair(folder, "web.example.com", days=days)
                    wanted_end = datetime.now(UTC) + timedelta(days=days - 1)
                    with trio.fail_after(60):
                        while dict(service.certificates.pairs())["web.example.com"].not_after < wanted_end:
                            await trio.sleep(0.02)
                        count = len(asked)
                        while len(asked) < count + 4:
                            await trio.sleep(0.02)
                is_over = True
            assert set(asked) == {expected}
            await service.delete("three")
            refused = await trio.to_thread.run_sync(
                partial(sh, "curl -sS -k --connect-to ::127.0.0.1: https://web.example.com/ 2>&1", check=False)
            )
            assert "unrecognized name" in refused, refused
            assert (await ask_secure("http://web.example.com:80/")).endswith("404")
        nursery.cancel_scope.cancel()
    await end_engines(folder / "engines")
