"""Ingresses as the server runs them: store, ports of the host, a confined worker, and a guest behind a cable."""

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
import trio.testing

from hypeman.errors import AlreadyExists, Conflict, InvalidRequest, NotFound, PortInUse
from hypeman.events.log import EVENTS
from hypeman.ingress.certificates.acme import Pace
from hypeman.ingress.certificates.service import Certificates, Settings
from hypeman.ingress.proxy import Place
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


def pid_of(service: Ingresses) -> int:
    """The worker's; 0 while there is none."""
    return service._link.pid if service._link is not None else 0


def is_free(port: int) -> bool:
    """Whether nobody listens there; past connections in TIME_WAIT do not count."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


@asynccontextmanager
async def ingresses(
    folder: Path, address: str, settings: Settings | None = None, pace: Pace | None = None
) -> AsyncIterator[Ingresses]:
    """A server's part, on the store in ``folder``."""
    store = Store.open(folder / "store")

    def place_of(name: str) -> Place:
        return Place(address if name == "web" else "", exists=name in ("web", "down"))

    async with store.serving(), trio.open_nursery() as nursery:
        certificates = Certificates(settings or Settings(), folder / "ingress", store, interval=0.05, pace=pace)
        service = Ingresses(store, find=find, place_of=place_of, certificates=certificates, uid=UID)
        await nursery.start(service.run)
        try:
            yield service
        finally:
            nursery.cancel_scope.cancel()
    store.close()


def serve_http(server: socket.socket) -> None:
    """Answers each connection once, with who asked."""
    while True:
        try:
            accepted, _ = server.accept()
        except OSError:
            return
        with accepted:
            head = accepted.recv(65536)
            who = next(line for line in head.split(b"\r\n") if line.startswith(b"x-forwarded-for:"))
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(who), who))


def curl(host: str, address: str = "127.0.0.1", port: int = 80) -> str:
    return sh(f"curl -sS -m 60 -w ' %{{http_code}}' -H 'Host: {host}' http://{address}:{port}/").strip()


async def ask(host: str, **more: object) -> str:
    return await trio.to_thread.run_sync(lambda: curl(host, **more))  # type: ignore[arg-type]


@in_namespace
async def test_from_the_world_to_a_guest_and_through_restarts(lab: Lab) -> None:
    guest = await lab.guest()
    folder = make_folder()
    with guest_host(guest) as inside, world_host(lab) as world, inside.serve(8000) as server:
        server.settimeout(None)
        async with trio.open_nursery() as nursery:
            # A thread in accept() cannot be cancelled: it must not hide why the test fails.
            nursery.start_soon(partial(trio.to_thread.run_sync, serve_http, server, abandon_on_cancel=True))
            async with ingresses(folder, guest.lease.ipv4) as service:
                made = await service.create(request("site", "Web.Example.com"))
                assert (await service.get("site"), await service.get(made.id[:9])) == (made, made)
                assert await ask("web.example.com") == "x-forwarded-for: 127.0.0.1 200"
                seen = await trio.to_thread.run_sync(
                    world.sh, f"curl -sS -m 60 -H 'Host: web.example.com' http://{HOST}/"
                )
                assert seen.strip() == "x-forwarded-for: 192.0.2.2"
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

                with trio.fail_after(30):  # what a worker that is killed has not reported is lost
                    while service.requests["site", "2xx"] < 2:
                        await trio.sleep(0.05)
                before = pid_of(service)
                status = Path(f"/proc/{before}/status").read_text()
                assert f"Uid:\t{UID}" in status
                assert "Seccomp:\t2" in status
                assert "CapEff:\t0000000000000000" in status
                os.kill(before, signal.SIGKILL)
                assert (await ask("web.example.com")).endswith(" 200"), "connections wait for the next worker"
                with trio.fail_after(60):  # it may answer before the server has heard that it is ready
                    while pid_of(service) in (0, before):
                        await trio.sleep(0.05)

            async with ingresses(folder, guest.lease.ipv4) as service:
                assert (await ask("web.example.com")).endswith(" 200"), "the next server has the rules"
                await service.delete("site")
                assert (await ask("web.example.com")).endswith(" 404")
                await service.delete("all")
                with trio.fail_after(30):  # the worker closes its copy of the listening socket a moment later
                    while not is_free(80):
                        await trio.sleep(0.02)
                types = service._store.read(lambda txn: [event.type for _, event in txn.scan(EVENTS)])
                assert types == ["ingress.created"] * 2 + ["ingress.deleted"] * 2
            server.shutdown(socket.SHUT_RDWR)


@in_namespace
async def test_a_port_of_another_program(lab: Lab) -> None:
    folder = make_folder()
    async with ingresses(folder, "127.0.0.1") as service:
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


@in_namespace
async def test_without_ingresses_there_is_no_worker(lab: Lab) -> None:
    async with ingresses(make_folder(), "127.0.0.1") as service:
        await trio.testing.wait_all_tasks_blocked()
        assert pid_of(service) == 0
        await service.create(request("site", "a.b", port=82))
        with trio.fail_after(60):
            while not pid_of(service):
                await trio.sleep(0.05)
        assert (await ask("c.d", port=82)).endswith(" 404"), "it serves"


def secure_curl(url: str, root: str, *more: str) -> str:
    """Page, status and redirect."""
    name, _, port = url.partition("//")[2].partition("/")[0].partition(":")
    command = f"curl -sS -m 60 -w ' %{{http_code}} %{{redirect_url}}' --cacert {root} {' '.join(more)}"
    return sh(f"{command} --connect-to {name}:{port}:127.0.0.1:{port} {url}").strip()


@in_namespace
async def test_tls_with_curl_and_the_confined_worker(lab: Lab) -> None:
    folder = make_folder()
    root = folder / "root.pem"
    paths = write_pair(folder, "web.example.com")
    settings = Settings(files={"site": paths})

    async def ask_secure(url: str, *more: str, trust: Path = root) -> str:
        return await trio.to_thread.run_sync(lambda: secure_curl(url, str(trust), *more))

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            head = await stream.receive_some(65536)
            who = next(line for line in head.split(b"\r\n") if line.startswith(b"x-forwarded-proto:"))
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(who), who))

    (guests,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = guests.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [guests])
        async with ingresses(folder, "127.0.0.1", settings) as service:
            root.write_text(await service.internal_root())
            for name, hostname in [("one", "web.internal"), ("two", "{x}.vm.internal"), ("three", "web.example.com")]:
                instance = "{x}" if "{" in hostname else "web"
                wanted = request(name, hostname, instance, port=443, target_port=port, tls=True, redirect_http=True)
                made = await service.create(wanted)
                assert made.certificates
                assert made.certificates[0].state is CertificateState.VALID
            assert service._records[made.id].ports == {80, 443}
            expected = "x-forwarded-proto: https 200"
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

            before = pid_of(service)
            os.kill(before, signal.SIGKILL)
            assert await ask_secure("https://web.internal:443/") == expected, "the next worker has the certificates"
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
