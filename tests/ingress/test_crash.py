"""Kill matrix: the server at every step of a change of ingresses, while the engine keeps running or ends with it.

Steps are commits, writes of files, sockets, ports of guests that the engine is let at, and messages to the engine, of
which half may be sent. After each: what was confirmed is in force at once and after the next start, what was deleted
answers nobody, a certificate is a current one, and no listener is without an ingress.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from cryptography import x509

from hypeman.egress.front import Place
from hypeman.egress.link import end_engines
from hypeman.egress.service import Egress, Settings
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.service import Settings as CertificateSettings
from hypeman.ingress.records import all_records
from hypeman.ingress.service import Ingresses
from hypeman.ingress.types import CreateIngressRequest
from hypeman.store import Store
from tests.crash import count_messages, run_until_killed
from tests.images.crash_points import Points
from tests.ingress.certs import write_pair
from tests.ingress.test_kill import free_port

pytestmark = pytest.mark.slow

GUEST = """
import http.server, threading
servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) for _ in range(2)]
for each in servers:
    threading.Thread(target=each.serve_forever).start()
print(*(each.server_port for each in servers), flush=True)
"""
"""An instance with two ports."""
FILE = "file.example.com"
_AGE = timedelta(days=4, hours=12)
"""Of certificates of the internal CA before they are renewed."""


def listen(port: int) -> Sequence[socket.socket]:
    made = socket.create_server(("127.0.0.1", port))
    made.setblocking(False)
    return [made]


class Scene:
    """What outlives servers: their folder, and the ports in it."""

    def __init__(self, folder: Path, guests: Sequence[int]) -> None:
        self.folder = folder
        self.engines = folder / "engines"
        self.shared, self.own = free_port(), free_port()
        self.guests = guests
        self.root = ""
        """The internal CA's, once it is made."""
        self.age = timedelta()
        """How far the clock of servers is behind."""
        self._done = folder / "done"

    def request(self, name: str) -> CreateIngressRequest:
        """``two`` is without TLS, ``three`` has a port of the host and one of the guest for itself, ``file`` has a
        certificate from files."""
        host = FILE if name == "file" else f"{name}.internal"
        alone = name == "three"
        match = {"hostname": host, "port": self.own if alone else self.shared}
        rule = {"match": match, "target": {"instance": "a", "port": self.guests[alone]}, "tls": name != "two"}
        return msgspec.convert({"name": name, "rules": [rule]}, CreateIngressRequest)

    def file(self) -> bytes:
        """The certificate in the file, DER."""
        return ssl.PEM_cert_to_DER_cert((self.folder / "cert.pem").read_text())

    def confirm(self, what: str) -> None:
        with self._done.open("a") as file:
            print(what, file=file, flush=True)

    def confirmed(self) -> list[str]:
        """What was, since this was last called."""
        lines = self._done.read_text().splitlines() if self._done.exists() else []
        self._done.unlink(missing_ok=True)
        return lines

    def certificate(self, name: str) -> bytes | None:
        """What is shown to clients, DER, empty without TLS; None if they do not trust it, or get no response of the
        guest."""
        request = self.request(name).rules[0].match
        with suppress(OSError):
            context = ssl.create_default_context(cadata=self.root)
            if name == "file":  # signed by itself
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with socket.create_connection(("127.0.0.1", request.port), timeout=30) as plain:
                if name == "two":
                    return b"" if self._is_answered(plain, request.hostname) else None
                with context.wrap_socket(plain, server_hostname=request.hostname) as secure:
                    shown = secure.getpeercert(binary_form=True)
                    return shown if self._is_answered(secure, request.hostname) else None
        return None

    def _is_answered(self, stream: socket.socket, host: str) -> bool:
        stream.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return stream.recv(100).startswith(b"HTTP/1.1 200 ")


class Server:
    def __init__(self, scene: Scene, service: Ingresses, opened: list[set[int]], engine: int) -> None:
        self.scene = scene
        self.service = service
        self.opened = opened
        """The ports of guests that the engine could reach, newest last."""
        self.engine = engine


Story = Callable[[Server], Awaitable[None]]


async def live(scene: Scene, *stories: Story) -> None:
    """One life of a server."""
    store = Store.open(scene.folder / "store")
    opened: list[set[int]] = []

    async def open_to_engine(ports: Iterable[int]) -> None:
        opened.append({*ports})

    files = {"site": (scene.folder / "cert.pem", scene.folder / "key.pem")}
    async with store.serving(), trio.open_nursery() as nursery:
        settings = Settings(address="127.0.0.1", port=0, loops=1)
        egress = Egress(settings, scene.folder / "egress", engines=scene.engines)
        service = Ingresses(
            store, egress.front, find=str, place_of=lambda _: Place("127.0.0.1", exists=True),
            certificates=Certificates(CertificateSettings(files=files), scene.folder / "ingress", store, interval=0.02,
                                      now=lambda: datetime.now(UTC) - scene.age),
            open_to_engine=open_to_engine, listen=listen,
        )  # fmt: skip
        with trio.fail_after(120):
            await nursery.start(egress.run)
            await nursery.start(service.run)
            await egress.accept()
            for story in stories:
                await story(Server(scene, service, opened, egress.engine_pid))
        nursery.cancel_scope.cancel()
    store.close()


async def shown(scene: Scene, name: str) -> bytes | None:
    return await trio.to_thread.run_sync(scene.certificate, name)


# ── What is done ─────────────────────────────────────────────────────────────────────────────────


async def begin(server: Server) -> None:
    """The engine knows where the guest is, so that it needs no server for requests."""
    server.scene.root = await server.service.internal_root()
    if not names_of(server.service):
        for name in ("one", "file"):
            await server.service.create(server.scene.request(name))
    assert await shown(server.scene, "one") is not None
    server.scene.confirm("begun")


async def create(server: Server) -> None:
    for name in ("two", "three"):
        await server.service.create(server.scene.request(name))
        server.scene.confirm(f"created {name}")


async def delete(server: Server) -> None:
    for name in ("two", "three"):
        await server.service.delete(name)
        server.scene.confirm(f"deleted {name}")


async def renew(server: Server) -> None:
    """The internal CA's, by the clock, and one from files, which are changed."""
    scene = server.scene
    before = await shown(scene, "one"), await shown(scene, "file")
    scene.age = timedelta()
    write_pair(scene.folder, FILE)
    for name, old in zip(("one", "file"), before, strict=True):
        assert old is not None
        while (new := await shown(scene, name)) in (old, None):
            await trio.sleep(0.01)
        assert new is not None
        scene.confirm(f"renewed {name} {old.hex()}")


# ── What must hold ───────────────────────────────────────────────────────────────────────────────


def names_of(service: Ingresses) -> set[str]:
    return {record.name for record in service._store.read(all_records)}


def outcome(confirmed: list[str], begun: set[str], verb: str) -> tuple[set[str], set[str]]:
    """Ingresses that must be there, and those that must not, of ``begun`` and the new ones."""
    done = {line.split()[1] for line in confirmed if line.startswith(verb)}
    changed = {"two", "three"}
    if verb == "deleted ":
        return begun - changed, done
    return begun | done, set() if verb == "created " else changed - begun


def check_at_once(
    scene: Scene, confirmed: list[str], there: set[str], gone: set[str], renewed: dict[str, bytes]
) -> None:
    """Without a server. The engine forgets where guests are when one connects, so some requests have to wait."""
    if "begun" in confirmed:
        for name in there:
            assert scene.certificate(name) not in (None, renewed.get(name)), name
    for name in gone:
        assert scene.certificate(name) is None, name


async def check_after(there: set[str], gone: set[str], renewed: dict[str, bytes], server: Server) -> None:
    scene, service = server.scene, server.service
    stored = names_of(service)
    assert there <= stored and not gone & stored, stored
    for name in ("one", "two", "three", "file"):
        certificate = await shown(scene, name)
        assert (certificate is not None) == (name in stored), name
        if certificate:
            ends = x509.load_der_x509_certificate(certificate).not_valid_after_utc
            assert ends - datetime.now(UTC) > timedelta(days=3), name
            assert certificate != renewed.get(name), "an older one is not shown again"
            assert name != "file" or certificate == scene.file()
    rules = [scene.request(name).rules[0] for name in stored]
    assert server.opened[-1] == {rule.target.port for rule in rules}
    used = {rule.match.port for rule in rules}
    assert listening(os.getpid()) - used == listening(server.engine) - used, "the proxy's own port apart"
    assert len(listening(server.engine) - used) == 1
    for port in {scene.shared, scene.own} - used:
        listen(port)[0].close()


def listening(pid: int) -> set[int]:
    """Ports on which a process holds listening sockets."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = {row[9]: int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inode = os.readlink(entry).removeprefix("socket:[").removesuffix("]")
            if inode in ports:
                found.add(ports[inode])
    return found


async def prepare(there: set[str], server: Server) -> None:
    """What the next life finds."""
    for name in names_of(server.service) ^ there:
        if name in there:
            await server.service.create(server.scene.request(name))
        else:
            await server.service.delete(name)


# ── The matrix ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    guest = subprocess.Popen(
        [sys.executable, "-c", GUEST], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert guest.stdout is not None
    write_pair(tmp_path, FILE)
    made = Scene(tmp_path, [int(port) for port in guest.stdout.readline().split()])
    try:
        yield made
    finally:
        trio.run(end_engines, made.engines)
        guest.kill()
        guest.wait()
        guest.stdout.close()


def count_ports(points: Points) -> None:
    Ingresses._hold = points.before(Ingresses._hold)  # type: ignore[method-assign]
    Ingresses._release = points.before(Ingresses._release)  # type: ignore[method-assign]


@pytest.mark.parametrize("both", [False, True], ids=["server", "both"])
@pytest.mark.parametrize("story", [create, delete, renew])
def test_the_server_is_killed_at_every_step(scene: Scene, tmp_path: Path, story: Story, both: bool) -> None:
    verb = "created " if story is create else "deleted " if story is delete else "renewed "
    begun = {"one", "file"} | ({"two", "three"} if story is delete else set())
    trio.run(live, scene, begin, partial(prepare, begun))
    scene.confirmed()
    at, reached = 0, True
    while reached:
        at += 1
        scene.age = _AGE if story is renew else timedelta()
        reached = run_until_killed(
            partial(live, scene, begin, story), tmp_path / f"journal-{at}", at, count_messages, count_ports
        )
        scene.age = timedelta()
        confirmed = scene.confirmed()
        there, gone = outcome(confirmed, begun, verb)
        renewed = {words[1]: bytes.fromhex(words[2]) for line in confirmed if len(words := line.split()) == 3}
        try:
            if both:
                trio.run(end_engines, scene.engines)
            else:
                check_at_once(scene, confirmed, there, gone, renewed)
            trio.run(live, scene, partial(check_after, there, gone, renewed), partial(prepare, begun))
        except BaseException as error:
            error.add_note(f"killed at point {at}, after {confirmed}")
            raise
    assert at > 20, at
