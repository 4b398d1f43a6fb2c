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
from functools import partial
from pathlib import Path

import msgspec
import trio
import trio.testing

from hypeman.errors import AlreadyExists, Conflict, NotFound, PortInUse
from hypeman.events.log import EVENTS
from hypeman.ingress.proxy import Place
from hypeman.ingress.service import Ingresses
from hypeman.ingress.types import CreateIngressRequest, Ingress
from hypeman.store import Store
from tests.network.hosts import guest_host, world_host
from tests.network.lab import HOST, Lab, in_namespace, sh

UID = 575535


def request(name: str, hostname: str, instance: str = "web", port: int = 80) -> CreateIngressRequest:
    rule = {"match": {"hostname": hostname, "port": port}, "target": {"instance": instance, "port": 8000}}
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
async def ingresses(folder: Path, address: str) -> AsyncIterator[Ingresses]:
    """A server's part, on the store in ``folder``."""
    store = Store.open(folder / "store")

    def place_of(name: str) -> Place:
        return Place(address if name == "web" else "", exists=name in ("web", "down"))

    async with store.serving(), trio.open_nursery() as nursery:
        service = Ingresses(store, find=find, place_of=place_of, uid=UID)
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
