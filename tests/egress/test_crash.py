"""Kill matrix: the server at every step of a policy change, while the engine keeps running or ends with it.

Steps are commits, writes of files, and messages to the engine, of which half may be sent; among them those of a start
that finds guests running. A guest asks all the time: no value older than one that was confirmed is sent, and nothing
is let through from when closing was confirmed until opening begins, by whichever server and engine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import trio
import trustme

from hypeman.egress.approvals import Approvals
from hypeman.egress.broker import Broker
from hypeman.egress.link import end_engines
from hypeman.egress.service import Egress, Settings, Timeouts
from hypeman.egress.sources import Sources
from hypeman.egress.types import (
    AccessDefault,
    CredentialPolicy,
    CredentialSource,
    EgressAccess,
    EgressEnforcementMode,
    InjectAs,
    InjectRule,
)
from hypeman.host.processes import Processes
from hypeman.instances.adapters import SECRETS, EgressOfInstances
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.rows import INSTANCES
from hypeman.network.addressing import Subnet
from hypeman.network.leases import LEASES, drop_lease, take_lease
from hypeman.network.types import NetworkPlan
from hypeman.store import Store, Txn
from tests.crash import count_messages, run_until_killed
from tests.egress.conftest import HOST
from tests.ingress.test_kill import free_port
from tests.instances.test_record import SOURCE, SPEC

pytestmark = pytest.mark.slow

SUBNET = Subnet.parse("127.0.1.0/24")
ENV = "REAL"
RULE = InjectRule(hosts=(HOST,), as_=InjectAs(header="Authorization", format="${value}"))
NOTHING = EgressAccess(default=AccessDefault.DENY)

ORIGIN = """
import http.server, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = self.headers["Authorization"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""A host that answers with the value that it is sent."""

GUEST = """
import http.client, socket, ssl, sys, time
port, log, ca, host = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
print("ready", flush=True)
with open(log, "a", buffering=1) as log:
    while True:
        for source in sys.argv[5:]:
            begin, status, value = time.monotonic_ns(), 0, ""
            try:
                trust = ssl.create_default_context(cafile=ca)
                with socket.create_connection(("127.0.0.1", port), 20, (source, 0)) as plain:
                    with trust.wrap_socket(plain, server_hostname=host) as secure:
                        secure.sendall(f"GET / HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n".encode())
                        response = http.client.HTTPResponse(secure)
                        response.begin()
                        status, value = response.status, response.read().decode()
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)
            print(source, begin, time.monotonic_ns(), status, value if status == 200 else "-", file=log)
"""
"""Guests at these addresses, one request after another."""


class Event(NamedTuple):
    at: int
    """In nanoseconds, of a clock that all processes share."""
    what: str
    value: int


class Request(NamedTuple):
    source: str
    began: int
    ended: int
    passed: bool
    value: str


class Scene:
    """What outlives servers."""

    def __init__(self, folder: Path, origin_port: int) -> None:
        self.folder = folder
        self.engines = folder / "engines"
        self.port = free_port()
        self.settings = Settings(
            address="127.0.0.1", port=self.port, loops=1, allow=("127.0.0.0/8",), trust_file=str(folder / "ca.pem"),
            assumed_tls_port=origin_port, timeouts=Timeouts(resolve=0.5),
        )  # fmt: skip
        self.events = folder / "events"
        self.log = folder / "log"

    def note(self, what: str, value: int = 0) -> None:
        with self.events.open("a") as file:
            print(time.monotonic_ns(), what, value, file=file, flush=True)

    def noted(self) -> list[Event]:
        rows = [line.split() for line in self.events.read_text().splitlines()]
        return [Event(int(at), what, int(value)) for at, what, value in rows]


class Server:
    def __init__(self, scene: Scene, store: Store, secrets: EgressOfInstances) -> None:
        self.scene = scene
        self.store = store
        self.secrets = secrets

    async def save(self, name: str, *, value: int = 0, access: EgressAccess | None = None) -> None:
        """As an update of an instance does: what it says is in the store, then it takes effect."""
        rule = CredentialPolicy(source=CredentialSource(env=ENV), inject=(RULE,))
        spec = msgspec.structs.replace(SPEC, credentials={"KEY": rule}, access=access, egress=EgressEnforcementMode.ALL)
        record = msgspec.structs.replace(SOURCE, id=name, name=name, spec=spec)

        def write(txn: Txn) -> None:
            take_lease(txn, name, NetworkPlan(enabled=True), SUBNET)
            txn.put(INSTANCES, name, record)
            self.secrets.seal(txn, name, {ENV: str(value)} if value else {})

        await self.store.write(write)
        await self.secrets.refresh(name)

    async def remove(self, name: str) -> None:
        def drop(txn: Txn) -> None:
            txn.delete(INSTANCES, name)
            drop_lease(txn, name, SUBNET)
            self.secrets.drop(txn, name)

        await self.secrets.release(name)
        await self.store.write(drop)


Story = Callable[[Server], Awaitable[None]]


async def live(scene: Scene, *stories: Story) -> None:
    """One life of a server, which finds the guests of its store running."""
    store = Store.open(scene.folder / "store")

    async def resolve(name: str) -> list[str]:
        return ["127.0.0.1"]

    async def log(action: str, shown: object) -> None: ...

    def found(txn: Txn) -> list[InstanceRecord]:
        return [record for _, record in txn.scan(INSTANCES)]

    async with store.serving(), trio.open_nursery() as nursery:
        egress = Egress(scene.settings, scene.folder / "egress", resolve=resolve, engines=scene.engines)
        broker = Broker(egress, Sources({}, Processes()), None, None)  # type: ignore[arg-type]
        secrets = EgressOfInstances(egress, broker, Approvals(log, timeout=5), store)
        (scene.folder / "guest.pem").write_bytes(egress.ca_pem)
        with trio.fail_after(120):
            await nursery.start(egress.run)
            await nursery.start(broker.run)
            for record in store.read(found):
                lease = store.read(lambda txn, key=record.id: txn.get(LEASES, key))  # type: ignore[misc]
                assert lease is not None
                await secrets.enforce(record, lease)
            await egress.accept()
            for story in stories:
                await story(Server(scene, store, secrets))
        nursery.cancel_scope.cancel()
    store.close()


# ── What is done ─────────────────────────────────────────────────────────────────────────────────


async def begin(server: Server) -> None:
    """Both are open and have a value; what happened before no longer counts."""
    scene = server.scene
    scene.log.write_text("")
    scene.events.write_text("")
    value = time.monotonic_ns()
    for name in ("one", "two"):
        await server.save(name, value=value)
    scene.note("value", value)


async def change(server: Server) -> None:
    scene = server.scene
    for access in (None, NOTHING):
        value = time.monotonic_ns()
        await server.save("one", value=value, access=access)
        scene.note("value", value)
        await wait_asked(scene)  # so that the engine has a connection to the host, and needs no server for requests
    scene.note("closed")
    await wait_asked(scene)
    value = time.monotonic_ns()
    await server.save("one", value=value, access=NOTHING)
    scene.note("value", value)
    scene.note("removing")
    await server.remove("two")
    scene.note("removed")
    scene.note("opening")
    await server.save("one")
    scene.note("open")


# ── What must hold ───────────────────────────────────────────────────────────────────────────────


async def wait_asked(scene: Scene, *, passed: bool = False) -> str:
    """The answer to a request of ``one`` that began after this call; ``passed``: that was let through."""
    since = time.monotonic_ns()
    while True:
        for request in requests(scene):
            if request.source == "127.0.1.2" and request.began > since and (request.passed or not passed):
                return request.value
        await trio.sleep(0.01)


def requests(scene: Scene) -> list[Request]:
    rows = [line.split() for line in scene.log.read_text().splitlines()]
    return [Request(row[0], int(row[1]), int(row[2]), row[3] == "200", row[4]) for row in rows if len(row) == 5]


async def check(server: Server) -> None:
    """What is stored is in force, and has all that was confirmed."""
    scene, events = server.scene, server.scene.noted()
    rows = server.store.read(lambda txn: {key: (record, txn.get(SECRETS, key)) for key, record in txn.scan(INSTANCES)})
    record, _ = rows["one"]
    said = {event.what for event in events}
    assert "two" in rows or "removing" in said
    assert "two" not in rows or "removed" not in said
    if "open" in said:
        assert record.spec.access is None
    if record.spec.access is None:
        value = await wait_asked(scene, passed=True)
        stored = server.store.read(lambda txn: server.secrets._open(txn, "one"))[ENV]
        assert value == stored
        assert int(value) >= max(event.value for event in events)
    else:
        assert "open" not in said
        scene.note("closed")
        await wait_asked(scene)
        scene.note("opening")


def check_log(scene: Scene) -> None:
    """What was let through all the while."""
    events = scene.noted()
    for request in requests(scene):
        if not request.passed:
            continue
        assert request.source != "127.0.1.9", "nobody has a policy for it"
        before = [event for event in events if event.at < request.began]
        if request.source == "127.0.1.3":
            assert "removed" not in [event.what for event in before]
            continue
        assert int(request.value) >= max((event.value for event in before), default=0), "an older value"
        last = [event.what for event in before if event.what in ("closed", "opening")]
        if last and last[-1] == "closed":
            opening = [event.at for event in events if event.what == "opening" and event.at > request.began]
            assert opening and opening[0] < request.ended, "let through while it was closed"


# ── The matrix ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "origin.pem"))
    origin = start(ORIGIN, tmp_path / "origin.pem")
    assert origin.stdout is not None
    made = Scene(tmp_path, int(origin.stdout.readline()))
    try:
        yield made
    finally:
        trio.run(end_engines, made.engines)
        stop(origin)


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("both", [False, True], ids=["server", "both"])
def test_the_server_is_killed_at_every_step(scene: Scene, tmp_path: Path, both: bool) -> None:
    trio.run(live, scene, begin)
    guests = start(GUEST, scene.port, scene.log, tmp_path / "guest.pem", HOST, "127.0.1.2", "127.0.1.3", "127.0.1.9")
    try:
        at, reached = 0, True
        while reached:
            at += 1
            reached = run_until_killed(partial(live, scene, change), tmp_path / f"journal-{at}", at, count_messages)
            try:
                if both:
                    trio.run(end_engines, scene.engines)
                trio.run(live, scene, check)
                check_log(scene)
                trio.run(live, scene, begin)
            except BaseException as error:
                error.add_note(f"killed at point {at}, after {scene.noted()}")
                raise
    finally:
        stop(guests)
    assert at > 20, at
