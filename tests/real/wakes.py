"""Requests that find an instance in standby: of every kind, from everywhere, and what became of each.

    answered   the right answer came back
    reported   the peer received an error: a reset, an ICMP error, a 5xx; right only if something was killed
    lost       anything else: silence, a wrong answer, an end without a word

``Wakes`` puts instances in standby and asks them at once, in turn by all kinds and from all places, and kills the
server and VMMs in between on request. ``cabled`` is a server with many guests that are namespaces (cabled.py);
``real`` one with a few real guests.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from hypeman.instances.model.phases import utc_now
from hypeman.network.addressing import mac_of
from tests.real.appliance import PATIENCE, Appliance
from tests.real.cabled import CABLE, GUESTS, namespace_of
from tests.real.world import World, appliance_in_world

HOST = "192.0.2.2"
"""The appliance's address in the world."""
GATEWAY = "10.100.0.1"
PORTS = {"http": 80, "tcp": 7, "udp": 7, "ssh": 22, "websocket": 80}
"""Of a guest, by the kind of request."""
PLACES = ("host", "world", "neighbour", "ingress")
WAYS = [(kind, place) for place in PLACES for kind in PORTS if place != "ingress" or kind in ("http", "websocket")]
SETTINGS = {"NETWORK__GUEST_TO_GUEST": "true", "NETWORK__DEFAULT_LIMITS": "false"}
POLICY = {"enabled": True, "idle_timeout": "10h"}
UDP_RETRY = 5.0
"""Seconds after which a client sends its datagram once more, as those of UDP do."""
_CLONE_NEWNET = 0x40000000


class Reported(Exception):
    """The peer received an error."""


# Peers


def socket_in(namespace: str, kind: socket.SocketKind) -> socket.socket:
    def make() -> socket.socket:
        with open(f"/run/netns/{namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        return socket.socket(socket.AF_INET, kind)

    with ThreadPoolExecutor(1) as thread:  # it is not used again
        return thread.submit(make).result()


class Place(msgspec.Struct, frozen=True):
    """From where a peer asks, and how it finds the instance there."""

    namespace: str
    address: str
    ports: dict[str, int]
    host: str = "guest"
    """For HTTP."""
    inside: str = ""
    """The instance in which UDP requests are made, if it is not in ``namespace``; to the address ``behind``."""
    behind: str = ""

    async def connect(self, kind: str) -> trio.SocketStream:
        sock = socket_in(self.namespace, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 30)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setblocking(False)
        made = trio.socket.from_stdlib_socket(sock)
        try:
            await made.connect((self.address, self.ports[kind]))
        except OSError as error:
            made.close()
            raise Reported(str(error)) from error
        return trio.SocketStream(made)

    async def datagram(self, text: str) -> tuple[str, int]:
        """The answer, and how often the question had to be sent again."""
        sock = socket_in(self.namespace, socket.SOCK_DGRAM)
        sock.setblocking(False)
        with trio.socket.from_stdlib_socket(sock) as channel:
            await channel.connect((self.address, self.ports["udp"]))
            for again in range(1000):
                try:
                    await channel.send(text.encode())
                    with trio.move_on_after(UDP_RETRY):
                        return (await channel.recv(2000)).decode(), again
                except OSError as error:
                    raise Reported(str(error)) from error
        raise AssertionError("the peer has no patience left")


class WebSocket:
    """An open one; its key is the example of RFC 6455."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    @classmethod
    async def open(cls, place: Place) -> WebSocket:
        stream = await place.connect("websocket")
        await stream.send_all(
            f"GET / HTTP/1.1\r\nHost: {place.host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n") and (more := await stream.receive_some(2000)):
            head += more
        if not head.startswith(b"HTTP/1.1 101"):
            await stream.aclose()
            raise Reported(repr(head[:60]))
        return cls(stream)

    async def ask(self, text: str) -> str:
        data, mask = text.encode(), os.urandom(4)
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
        await self._stream.send_all(bytes([0x81, 0x80 | len(data)]) + mask + masked)
        got = b""
        while len(got) < len(data) + 2 and (more := await self._stream.receive_some(2000)):
            got += more
        if not got:
            raise Reported("the connection was closed")
        return got[2:].decode() if got[:2] == bytes([0x81, len(data)]) else repr(got)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


async def _http(place: Place, text: str) -> str:
    async with await place.connect("http") as stream:
        await stream.send_all(f"GET /{text} HTTP/1.1\r\nHost: {place.host}\r\nConnection: close\r\n\r\n".encode())
        got = b"".join([data async for data in stream])
    head, _, body = got.partition(b"\r\n\r\n")
    if head.split(b" ")[1:2] == [b"200"]:
        return body.decode()
    raise Reported(head.split(b"\r\n")[0].decode() or "the connection was closed")


async def _tcp(place: Place, text: str) -> str:
    async with await place.connect("tcp") as stream:
        await stream.send_all(text.encode())
        got = await stream.receive_some(2000)
    if not got:
        raise Reported("the connection was closed")
    return bytes(got).decode()


async def _ssh(place: Place, text: str, key: Path) -> str:
    command = ["ip", "netns", "exec", place.namespace, "dbclient", "-y", "-y", "-K", "5", "-i", str(key)]
    command += ["-p", str(place.ports["ssh"]), f"root@{place.address}", f"echo {text}"]
    result = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if result.returncode:
        raise Reported(result.stderr.decode().strip().splitlines()[-1])
    return result.stdout.decode().strip()


# Wakes


class Target(msgspec.Struct):
    name: str
    places: dict[str, Place]


class Tally:
    def __init__(self) -> None:
        self.answered: Counter[tuple[str, str]] = Counter()
        self.reported: Counter[str] = Counter()
        """By what was killed."""
        self.lost: list[str] = []
        self.kills: Counter[str] = Counter()
        self.disturbed = 0
        """Requests during which something was killed."""
        self.resent = 0
        """Datagrams that were sent more than once."""
        self.first_byte: list[float] = []
        """Seconds, of undisturbed requests but SSH."""
        self.restore: list[float] = []
        """Seconds, of the same wakes, as the server reports them."""

    @property
    def requests(self) -> int:
        return self.answered.total() + self.reported.total() + len(self.lost)


class Wakes:
    """``wanted`` wakes of ``targets``; with ``kills_every`` the server or a VMM is killed after so many."""

    def __init__(
        self,
        appliance: Appliance,
        targets: list[Target],
        key: Path,
        *,
        wanted: int,
        kills_every: int = 0,
        seed: int = 0,
    ) -> None:
        self.tally = Tally()
        self._appliance = appliance
        self._targets = targets
        self._key = key
        self._wanted = wanted
        self._kills_every = kills_every
        self._random = random.Random(seed)
        self._begun = 0
        self._kills = 0
        """Begun and ended ones: odd during one."""
        self._what = ""
        transport = httpx.AsyncHTTPTransport(uds=str(appliance.socket), verify=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://hypeman", timeout=PATIENCE)

    async def run(self, seconds: float = float("inf")) -> Tally:
        """Until all are done, or no more are begun after ``seconds``."""
        end = trio.current_time() + seconds
        async with trio.open_nursery() as nursery:
            if self._kills_every:
                nursery.start_soon(self._kill_now_and_then)
            async with trio.open_nursery() as workers:
                for target in self._targets:
                    workers.start_soon(self._work, target, end)
            nursery.cancel_scope.cancel()
        await self._client.aclose()
        return self.tally

    async def _work(self, target: Target, end: float) -> None:
        while self._begun < self._wanted and trio.current_time() < end:
            kind, place = WAYS[self._begun % len(WAYS)]
            self._begun += 1
            if place in target.places:
                await self._wake(target, kind, place, f"wake{self._begun}")

    async def _wake(self, target: Target, kind: str, place: str, text: str) -> None:
        channel = await self._open(target, place) if kind == "websocket" else None
        kills = self._kills
        try:
            asleep_at = await self._put_in_standby(target.name)
            begin = time.monotonic()
            try:
                with trio.fail_after(PATIENCE):
                    answer = await self._ask(target, kind, place, text, channel)
                outcome = "" if answer == text else f"answered {answer!r} instead of {text!r}"
            except (Reported, OSError, trio.BrokenResourceError) as error:
                outcome = f"reported: {error!r}"
            except trio.TooSlowError:
                outcome = "silence"
        finally:
            if channel is not None:
                await channel.aclose()
        disturbed = kills % 2 or kills != self._kills
        self.tally.disturbed += bool(disturbed)
        if not outcome:
            self.tally.answered[kind, place] += 1
            if not disturbed:
                await self._note_times(target.name, kind, asleep_at, time.monotonic() - begin)
        elif disturbed and outcome.startswith("reported"):
            self.tally.reported[self._what] += 1
        else:
            self.tally.lost.append(f"{kind} from {place} to {target.name}: {outcome}")
            print("lost:", self.tally.lost[-1], flush=True)  # also if what follows fails

    async def _ask(self, target: Target, kind: str, place: str, text: str, channel: WebSocket | None) -> str:
        peer = target.places[place]
        if channel is not None:
            return await channel.ask(text)
        if kind == "http":
            return await _http(peer, text)
        if kind == "tcp":
            return await _tcp(peer, text)
        if kind == "ssh":
            return await _ssh(peer, text, self._key)
        if peer.inside:
            _, output = await self._appliance.exec(peer.inside, "/echo", peer.behind, "7", stdin=text.encode())
            return output.strip()
        answer, again = await peer.datagram(text)
        self.tally.resent += bool(again)
        return answer

    async def _open(self, target: Target, place: str) -> WebSocket:
        """A WebSocket to the instance, which is brought back for it."""
        with trio.fail_after(PATIENCE):
            while True:
                with suppress(OSError, Reported, trio.BrokenResourceError):
                    return await WebSocket.open(target.places[place])
                await trio.sleep(0.1)

    async def _put_in_standby(self, name: str) -> str:
        """Returns a time before it is in standby, whatever happens to it and to the server meanwhile."""
        with trio.fail_after(PATIENCE):
            while True:
                begin = utc_now().isoformat()
                with suppress(httpx.TransportError):
                    answer = await self._client.post(f"/instances/{name}/standby")
                    if answer.is_success or await self._state(name) == "Standby":
                        return begin
                await trio.sleep(0.1)

    async def _state(self, name: str) -> str:
        return str((await self._client.get(f"/instances/{name}")).json()["state"])

    async def _note_times(self, name: str, kind: str, asleep_at: str, seconds: float) -> None:
        """An answered request has woken the instance: it is recorded a moment later."""
        with suppress(httpx.TransportError), trio.fail_after(PATIENCE):
            while True:
                status = (await self._client.get(f"/instances/{name}/auto-standby/status")).json()
                if (last := status["last_wake"]) is not None and last["at"] > asleep_at:
                    break
                await trio.sleep(0.01)
            if kind != "ssh":  # many round trips
                self.tally.first_byte.append(seconds)
                self.tally.restore.append(last["milliseconds"] / 1000)

    async def _kill_now_and_then(self) -> None:
        following = self._kills_every
        while True:
            while self._begun < following:
                await trio.sleep(0.01)
            await trio.sleep(self._random.random() * 0.2)
            self._what = "VMM" if self.tally.kills.total() % 2 else "server"
            self._kills += 1
            if self._what == "server":
                self._appliance.kill()
                await self._appliance.start()
            else:
                while not await self._kill_one_vmm():
                    await trio.sleep(0.05)
            self.tally.kills[self._what] += 1
            self._kills += 1
            following += self._kills_every

    async def _kill_one_vmm(self) -> bool:
        """And wait until its restart policy has brought it back. False if there was none, or it had just ended."""
        found = {
            (await self._appliance.get(f"/instances/{target.name}"))["id"]: target.name for target in self._targets
        }
        pids = {pid: Path(run).name for pid, run in self._appliance.vmms().items() if Path(run).name in found}
        if not pids:
            return False
        pid = self._random.choice(sorted(pids))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False  # it has just entered standby
        name = found[pids[pid]]
        with trio.move_on_after(10):  # one that was about to end in standby does so
            while await self._state(name) not in ("Stopped", "Shutdown"):
                await trio.sleep(0.05)
        with trio.move_on_after(PATIENCE):
            while await self._state(name) not in ("Running", "Standby"):
                await trio.sleep(0.05)
        return True


async def check_agreement(appliance: Appliance) -> str:
    """States, VMMs, links, routes, leases, memory and captures agree once nothing is in progress; returns the states.

    What the last work leaves for later is waited for.
    """
    with trio.fail_after(PATIENCE):
        while (
            trouble := await _disagreement(appliance)
        ) and trio.current_effective_deadline() - trio.current_time() > 5:
            await trio.sleep(0.2)
    assert not trouble, f"{trouble}\n{appliance.log_tail()}"
    states = Counter(each["state"] for each in await appliance.get("/instances"))
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


async def _disagreement(appliance: Appliance) -> list[str]:
    found = await appliance.get("/instances")
    running = [each for each in found if each["state"] == "Running"]
    asleep = [each for each in found if each["state"] == "Standby"]
    held = [each for each in asleep if each["auto_standby"].get("enabled")]
    routes = {route["dst"]: route["dev"] for route in json.loads(appliance.namespace.run("ip", "-j", "route"))}
    links = [link for link in appliance.namespace.links() if link.startswith("hm-") and link != "hm-wake"]
    memory = (await appliance.get("/resources"))["memory"]["allocated"]
    addresses = [each["network"]["ip"] for each in found]
    checks = {
        "another state": len(running) + len(asleep) == len(found),
        "VMMs": sorted(Path(run).name for run in appliance.vmms().values()) == sorted(each["id"] for each in running),
        "run directories": len(list((appliance.socket.parent / "vm").iterdir())) == len(running),
        "TAPs": len(links) == len(running),
        "routes to TAPs": {routes.get(each["network"]["ip"]) for each in running} <= set(links),
        "routes to hm-wake": {routes.get(each["network"]["ip"]) for each in held} <= {"hm-wake"},
        "addresses": len(set(addresses)) == len(found),
        "memory": memory == len(running) * 128 << 20,
        "captures": len(list((appliance.data / "captures").iterdir())) == len(asleep),
    }
    return [f"{what} ({len(running)} run)" for what, agrees in checks.items() if not agrees]


# Servers and guests


def check_programs() -> None:
    """Skip, saying why, where the programs of peers are missing."""
    for program in ("dropbear", "dropbearkey", "dbclient"):
        if shutil.which(program, path=f"/usr/sbin:{os.environ['PATH']}") is None:
            pytest.skip("dropbear-bin is not installed")


def compile_program(name: str, folder: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = folder / name
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run([compiler, "-O1", *flags, "-o", program, source], check=True)
    return program


def make_keys(folder: Path) -> Path:
    """The client's key; the server's and what it admits are next to it."""
    for name in ("client", "server"):
        subprocess.run(["dropbearkey", "-t", "ed25519", "-f", folder / name], check=True, capture_output=True)
    completed = subprocess.run(
        ["dropbearkey", "-y", "-f", folder / "client"], check=True, capture_output=True, text=True
    )
    public = next(line for line in completed.stdout.splitlines() if line.startswith("ssh-"))
    (folder / "authorized_keys").write_text(public + "\n")
    return folder / "client"


@contextmanager
def guest_namespace(prefix: str, offset: int, programs: Path) -> Iterator[str]:
    """What an instance with the address number ``offset`` is, but for its VM."""
    mac = mac_of(offset)
    name = prefix + namespace_of(mac)
    commands = [
        "ip link set lo up",
        f"ip tuntap add eth0 mode tap vnet_hdr && ip link set eth0 address {mac} && ip link set eth0 up",
        f"ip addr add 10.100.0.{offset}/32 dev eth0 && ip route add {GATEWAY} dev eth0",
        f"ip route add default via {GATEWAY} dev eth0",
    ]
    subprocess.run(["ip", "netns", "add", name], check=True)
    home = (
        f"mount -t tmpfs -o mode=700 none /root && mkdir -m 700 /root/.ssh && cp {programs}/authorized_keys /root/.ssh"
    )
    services = [f"exec {programs}/echo", f"{home} && exec dropbear -F -E -m -p 22 -r {programs}/server"]
    started = []
    try:
        subprocess.run(["ip", "netns", "exec", name, "sh", "-ec", "\n".join(commands)], check=True)
        with open(programs / "guests.log", "ab") as log:
            for service in services:
                argv = ["ip", "netns", "exec", name, "sh", "-c", service]
                started.append(subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True))
        yield name
    finally:
        pids = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True).stdout
        for pid in map(int, pids.split()):
            os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()
        subprocess.run(["ip", "netns", "del", name], check=True)


@asynccontextmanager
async def cabled(directory: Path, guests: int, **environ: str) -> AsyncIterator[tuple[Appliance, list[Target], Path]]:
    """A server with ``guests`` instances whose VMs are namespaces, and one more that asks them; the key for SSH."""
    check_programs()
    programs = directory / "programs"
    programs.mkdir()
    compile_program("echo", programs, "-static")
    cable = compile_program("cable", programs)
    key = make_keys(programs)
    prefix = f"hmg{secrets.token_hex(3)}"
    room = {f"OVERSUBSCRIPTION__{what}": "1000" for what in ("CPU", "MEMORY", "DISK")}
    settings = {CABLE: str(cable), GUESTS: prefix, **SETTINGS, **room, **environ}
    with ExitStack() as stack:
        namespaces = {f"10.100.0.{offset}": stack.enter_context(guest_namespace(prefix, offset, programs))
                      for offset in range(2, guests + 3)}  # fmt: skip
        async with appliance_in_world(directory, ("tests.real.cabled",), **settings) as (appliance, world):
            made = [await create(appliance, number) for number in range(guests)]
            asking = await appliance.create("neighbour", auto_standby=POLICY)
            await enter(appliance)
            neighbour = namespaces[asking["network"]["ip"]]
            targets = [
                Target(each["name"], places(appliance, world, each, number, neighbour))
                for number, each in enumerate(made)
            ]
            yield appliance, targets, key


async def create(appliance: Appliance, number: int, **changes: Any) -> Any:
    """An instance that packets wake, with published ports."""
    ports = [
        {"host_port": outer, "guest_port": PORTS[kind], "protocol": "udp" if kind == "udp" else "tcp"}
        for kind, outer in published(number).items()
        if kind != "websocket"
    ]
    again = {"policy": "always", "backoff": "1s"}
    return await appliance.create(f"vm{number}", auto_standby=POLICY, restart_policy=again, ports=ports, **changes)


def published(number: int) -> dict[str, int]:
    """Ports of the host, by the kind of request."""
    return {"http": 8000 + number, "tcp": 7000 + number, "udp": 7000 + number, "ssh": 2200 + number,
            "websocket": 8000 + number}  # fmt: skip


async def enter(appliance: Appliance) -> None:
    """Have requests for NAME.example.com go to the instance NAME."""
    rule = {"match": {"hostname": "{name}.example.com"}, "target": {"instance": "{name}", "port": 80}}
    await appliance.post("/ingresses", {"name": "all", "rules": [rule]})


def places(appliance: Appliance, world: World, made: Any, number: int, neighbour: str) -> dict[str, Place]:
    """From where the instance is asked; ``neighbour``: the namespace of another guest."""
    return {
        "host": Place(appliance.namespace.name, made["network"]["ip"], PORTS),
        "world": Place(world.name, HOST, published(number)),
        "neighbour": Place(neighbour, made["network"]["ip"], PORTS),
        "ingress": Place(world.name, HOST, dict.fromkeys(PORTS, 80), host=f"{made['name']}.example.com"),
    }


@asynccontextmanager
async def real(directory: Path, guests: int, **environ: str) -> AsyncIterator[tuple[Appliance, list[Target], Path]]:
    """A server with ``guests`` real guests, and one more that asks them: it relays TCP; the key for SSH."""
    check_programs()
    programs = directory / "programs"
    programs.mkdir()
    compile_program("echo", programs, "-static")
    key = make_keys(programs)
    services = ["sh", "-c", "until [ -e /ready ]; do sleep 0.1; done; dropbear -p 22 -r /server; exec /echo"]
    async with appliance_in_world(directory, **SETTINGS, **environ) as (appliance, world):
        made = [await create(appliance, number, cmd=services) for number in range(guests)]
        asking = await appliance.create("neighbour", cmd=services)
        await enter(appliance)
        archive = guest_archive(programs)
        for each in (*made, asking):
            code, output = await appliance.exec(each["name"], "tar", "x", "-C", "/", stdin=archive)
            assert code == 0, output
        targets = []
        for number, each in enumerate(made):
            found = places(appliance, world, each, number, "")
            found["neighbour"] = await relayed(appliance, asking, each, number)
            targets.append(Target(each["name"], found))
        yield appliance, targets, key


async def relayed(appliance: Appliance, asking: Any, asked: Any, number: int) -> Place:
    """The way to an instance through the guest of another one."""
    ports = {kind: 1000 * (number + 1) + port for kind, port in PORTS.items()}
    address = asked["network"]["ip"]
    for outer, port in {(ports[kind], port) for kind, port in PORTS.items()}:
        command = f"nc -ll -p {outer} -e nc {address} {port} >/dev/null 2>&1 </dev/null &"
        code, output = await appliance.exec(asking["name"], "sh", "-c", command)
        assert code == 0, output
    return Place(appliance.namespace.name, asking["network"]["ip"], ports, inside=asking["name"], behind=address)


def guest_archive(programs: Path) -> bytes:
    """What a guest needs to serve: a tar archive, whose last file says that all is there."""
    dropbear = Path(shutil.which("dropbear", path="/usr/sbin:/usr/bin") or "")
    libraries = subprocess.run(["ldd", dropbear], check=True, capture_output=True, text=True).stdout
    needed = [word for word in libraries.split() if word.startswith("/")]
    files = {"bin/dropbear": dropbear, "echo": programs / "echo", "server": programs / "server",
             ".ssh/authorized_keys": programs / "authorized_keys"}  # fmt: skip
    saved = io.BytesIO()
    with tarfile.open(fileobj=saved, mode="w") as archive:
        for name, path in (*files.items(), *((path.removeprefix("/"), Path(path)) for path in needed)):
            with open(path, "rb") as file:
                archive.addfile(archive.gettarinfo(name, name, file), file)
        archive.addfile(tarfile.TarInfo("ready"))
    return saved.getvalue()
