"""The fence and the limits around real guests, through the API of a real server.

    world ── uplink ── [ server, rules, queues ] ── TAP ── QEMU ── a guest that sends whatever it likes

For each rule the packet that it must stop is sent by the guest and seen not to arrive, and the neighbouring legal
one arrives. tests/network does the same, and more of it, with frames and without guests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from hypeman.network.shaping import token_bucket
from tests.network import frames
from tests.network.frames import ARP, IPV4, IPV6, UDP
from tests.real.appliance import PATIENCE, Appliance, Namespace, check_host, short_directory
from tests.real.world import ADDRESS, World, appliance_in_world

pytestmark = [pytest.mark.real, pytest.mark.slow]

GATEWAY, GATEWAY_MAC = "10.100.0.1", "02:00:00:00:00:01"
API_PORT = 8080
METADATA = "169.254.169.254"
WORLD_6, OUR_6 = "2001:db8::1", "2001:db8::2"

SNIFFER = """
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
sock.bind((sys.argv[1], 0))
print("ready", flush=True)
while True:
    print(sock.recv(65536).hex(), flush=True)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("net")


class Sniffer:
    """Every frame on an interface, in both directions."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdout is not None
        self._stream = process.stdout
        self._rest = b""

    async def line(self) -> str:
        with trio.fail_after(PATIENCE):
            while b"\n" not in self._rest:
                self._rest += await self._stream.receive_some(65536)
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    async def until(self, mark: bytes) -> list[bytes]:
        """All frames up to and with the first that has ``mark`` in it."""
        seen = [bytes.fromhex(await self.line())]
        while mark not in seen[-1]:
            seen.append(bytes.fromhex(await self.line()))
        return seen


@asynccontextmanager
async def sniffing(namespace: Namespace, interface: str) -> AsyncIterator[Sniffer]:
    argv = namespace.command(sys.executable, "-u", "-c", SNIFFER, interface)
    process = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
    try:
        sniffer = Sniffer(process)
        assert await sniffer.line() == "ready"
        yield sniffer
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


class Guest:
    """One that can learn to forge frames."""

    def __init__(self, appliance: Appliance, name: str, facts: dict[str, Any]) -> None:
        self._appliance = appliance
        self._name = name
        self.ip, self.mac = facts["ip"], facts["mac"]
        self._number = 0

    async def sh(self, script: str) -> None:
        code, text = await self.run("sh", "-c", script)
        assert code == 0, text

    async def learn(self, program: Path) -> None:
        code, text = await self.run("sh", "-c", "cat > /frame && chmod +x /frame", stdin=program.read_bytes())
        assert code == 0, text

    async def run(self, *command: str, stdin: bytes = b"") -> tuple[int, str]:
        return await self._appliance.exec(self._name, *command, stdin=stdin)

    async def send(self, *sent: bytes) -> None:
        code, text = await self.run("/frame", "eth0", stdin=b"".join(len(f).to_bytes(2, "big") + f for f in sent))
        assert code == 0, text

    def udp(self, to: str, data: bytes, *, source: str = "", source_mac: str = "", port: int = 9) -> bytes:
        source = source or self.ip
        packet = frames.ipv4(source, to, UDP, frames.udp(source, to, 4000, port, data))
        return frames.ethernet(GATEWAY_MAC, source_mac or self.mac, IPV4, packet)

    async def marked(self, sniffer: Sniffer) -> list[bytes]:
        """All that the world saw until a legal datagram arrived there that was sent after all else. The first
        one shows that the way is open; before the second was even made, what came before the first was through."""
        seen: list[bytes] = []
        for _ in range(2):
            self._number += 1
            mark = f"mark {self._number}.".encode()
            await self.send(self.udp(ADDRESS, mark))
            seen += await sniffer.until(mark)
        return seen

    async def connects(self, address: str, port: int) -> bool:
        return (await self.run("sh", "-c", f"nc -w 10 {address} {port} < /dev/null"))[0] == 0


@pytest.fixture
async def fenced(directory: Path, frame_program: Path) -> AsyncIterator[tuple[Appliance, World, Guest, Guest]]:
    """Two guests, the API on a TCP port, and a host that would route all of what guests must not send."""
    settings = {"PORT": str(API_PORT), "LISTEN_ADDRESS": "0.0.0.0", "JWT_SECRET": "for a test only, and long enough"}
    async with appliance_in_world(directory, **settings) as (appliance, world):
        uplink = next(name for name in appliance.namespace.links() if name.startswith("w"))
        appliance.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for namespace, address, link in ((world, WORLD_6, "wan"), (appliance.namespace, OUR_6, uplink)):
            namespace.run("ip", "addr", "add", f"{address}/64", "dev", link, "nodad")
        appliance.namespace.run("ip", "route", "add", "default", "via", WORLD_6)
        world.run("ip", "addr", "add", f"{METADATA}/32", "dev", "wan")
        guests = []
        for name in ("one", "two"):
            made = await appliance.create(name)
            guests.append(Guest(appliance, name, made["network"]))
            await guests[-1].learn(frame_program)
        yield appliance, world, guests[0], guests[1]


@pytest.fixture(scope="session")
def frame_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("frame") / "frame"
    subprocess.run([compiler, "-O1", "-static", "-s", "-o", program, Path(__file__).with_name("frame.c")], check=True)
    return program


async def test_what_a_guest_must_not_send_does_not_arrive(fenced: tuple[Appliance, World, Guest, Guest]) -> None:
    appliance, world, one, two = fenced
    neighbours = believed(appliance)
    fragment = frames.udp(two.ip, ADDRESS, 4000, 9, b"forged: second half")[8:]
    forged = {
        "address of nobody": one.udp(ADDRESS, b"forged: nobody", source="10.100.77.77"),
        "address of a neighbour": one.udp(ADDRESS, b"forged: neighbour", source=two.ip),
        "address of the world": one.udp(ADDRESS, b"forged: world", source="198.51.100.7"),
        "MAC of a neighbour": one.udp(ADDRESS, b"forged: mac", source_mac=two.mac),
        "fragment of a neighbour": frames.ethernet(
            GATEWAY_MAC, one.mac, IPV4, frames.ipv4(two.ip, ADDRESS, UDP, fragment, fragment=0x0001)
        ),
        "metadata service": one.udp(METADATA, b"forged: metadata"),
        "IPv6": frames.ethernet(
            GATEWAY_MAC, one.mac, IPV6, frames.ipv6("2001:db8::66", WORLD_6, UDP,
            frames.udp6("2001:db8::66", WORLD_6, 4000, 9, b"forged: v6")),
        ),
        "ARP in the gateway's name": frames.ethernet(
            frames.BROADCAST, one.mac, ARP, frames.arp(2, one.mac, GATEWAY, two.ip)
        ),
        "ARP in a neighbour's name": frames.ethernet(
            frames.BROADCAST, one.mac, ARP, frames.arp(2, one.mac, two.ip, GATEWAY)
        ),
    }  # fmt: skip
    async with sniffing(world, "wan") as sniffer:
        await one.marked(sniffer)
        await one.send(*forged.values())
        seen = await one.marked(sniffer)
        assert not [frame for frame in seen if b"forged" in frame]
        code, text = await one.run("ping", "-c", "1", "-w", "30", "-s", "3000", ADDRESS)
        assert code == 0, f"legal fragments do not pass: {text}"
    assert believed(appliance) == neighbours
    assert (await two.run("ping", "-c", "1", "-w", "30", GATEWAY))[0] == 0


def believed(appliance: Appliance) -> list[str]:
    """Who has which address, as the host believes of guests."""
    return sorted(line for line in appliance.namespace.run("ip", "neigh", "show").splitlines() if " hm-" in line)


async def test_a_guest_reaches_neither_its_neighbour_nor_the_host(
    fenced: tuple[Appliance, World, Guest, Guest],
) -> None:
    appliance, world, one, two = fenced
    taps = {name for name in appliance.namespace.links() if name.startswith("hm-")}
    (tap,) = [name for name in taps if two.ip in appliance.namespace.run("ip", "route", "show", "dev", name)]
    async with sniffing(appliance.namespace, tap) as sniffer:
        await one.send(one.udp(two.ip, b"forged: guest to guest"))
        await one.send(one.udp(two.ip, b"forged: again", port=53))
        assert (await one.run("ping", "-c", "1", "-w", "2", two.ip))[0] != 0
        assert not await one.connects(two.ip, 9)
        await two.send(two.udp(GATEWAY, b"mark"))
        seen = await sniffer.until(b"mark")
        assert not [frame for frame in seen if frames.mac(one.mac) in frame or b"forged" in frame]
    knock = f"import socket; socket.create_connection(('{GATEWAY}', {API_PORT}), 10)"
    appliance.namespace.run(sys.executable, "-c", knock)  # it listens there
    for address in (GATEWAY, "192.0.2.2"):
        assert not await one.connects(address, API_PORT)
    server = "import socket\ns = socket.create_server(('', 8081))\nprint('ready')\nwhile True: s.accept()[0].close()"
    with world.serving(server):
        assert await one.connects(ADDRESS, 8081)
        assert not await one.connects(METADATA, 8081)
    with appliance.namespace.serving(server):
        assert not await one.connects(GATEWAY, 8081)
        assert not await one.connects("192.0.2.2", 8081)
    assert (await one.run("ping", "-c", "1", "-w", "30", GATEWAY))[0] == 0


async def test_a_deleted_tap_is_mended_under_its_guest(directory: Path) -> None:
    async with appliance_in_world(directory) as (appliance, _):
        await appliance.create("one", network={"bandwidth_upload": "20mbps", "bandwidth_download": "20mbps"})
        ping = ("ping", "-c", "1", "-w", "2", "-s", "1400", ADDRESS)
        assert (await appliance.exec("one", *ping))[0] == 0
        before = queues(appliance)
        (tap,) = [name for name in appliance.namespace.links() if name.startswith("hm-")]
        appliance.namespace.run("ip", "link", "del", tap)
        with trio.fail_after(PATIENCE):
            while (await appliance.exec("one", *ping))[0] != 0:
                await trio.sleep(0.1)
        assert queues(appliance).keys() == before.keys()
        text = appliance.log.read_text()
        assert "was deleted by others" in text and "attached to its TAP again" in text
        await appliance.post("/instances/one/standby")
        await appliance.post("/instances/one/restore")
        assert (await appliance.exec("one", *ping))[0] == 0


# ── Limits ───────────────────────────────────────────────────────────────────────────────────────

MBIT = 125_000
TOLERANCE = 0.10
WINDOW, MOST_WINDOWS = 2.0, 5
"""Seconds of one window, and how many may pass until each queue has had one in which it came up to its limit."""

FLOOD = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", int(sys.argv[1])))
print("ready")
guest = sock.recvfrom(100)[1]
data, pause = bytes(1400), 0.005
while True:
    for _ in range(int(float(sys.argv[2]) * pause / 1400) + 1):
        try:
            sock.sendto(data, guest)
        except OSError:
            pass
    time.sleep(pause)
"""
SINK = """
import selectors, socket
server = socket.create_server(("", 9))
chosen = selectors.DefaultSelector()
chosen.register(server, 1)
print("ready")
while True:
    for key, _ in chosen.select():
        if key.fileobj is server:
            chosen.register(server.accept()[0], 1)
        elif not key.fileobj.recv(1 << 20):
            chosen.unregister(key.fileobj)
"""


class Queue(NamedTuple):
    """A token bucket as the kernel reports it."""

    bytes: int
    """That have passed."""
    backlog: int
    """That wait."""


class Look(NamedTuple):
    """All queues, somewhen between two times."""

    begin: float
    end: float
    queues: dict[str, Queue]


def queues(appliance: Appliance) -> dict[str, Queue]:
    document = json.loads(appliance.namespace.run("tc", "-s", "-j", "qdisc", "show"))
    return {each["dev"]: Queue(each["bytes"], each["backlog"]) for each in document if each["kind"] == "tbf"}


def look(appliance: Appliance) -> Look:
    begin = time.monotonic()
    found = queues(appliance)
    return Look(begin, time.monotonic(), found)


async def measure(appliance: Appliance, limits: dict[str, int]) -> None:
    """The rate of each queue, over windows of a few seconds: never above its limit, and never below it while the queue
    was half full or more at each look. When exactly a look was taken is not known on a busy machine, and what
    could be the fault of that is not counted. A window at the limit is soon there, unless guest and sender are
    too slow to fill a queue: that is reported, and is no fault of the limit.
    """
    unproved = dict(limits)
    await trio.sleep(1)  # the buckets are full at first
    for _ in range(MOST_WINDOWS):
        looks = [await trio.to_thread.run_sync(look, appliance)]
        while looks[-1].begin < looks[0].end + WINDOW:
            await trio.sleep(0.05)
            looks.append(await trio.to_thread.run_sync(look, appliance))
        first, last = looks[0], looks[-1]
        for device, limit in limits.items():
            passed = last.queues[device].bytes - first.queues[device].bytes
            lowest, highest = passed / (last.end - first.begin), passed / (last.begin - first.end)
            reported = f"{device}: {lowest / MBIT:.1f} to {highest / MBIT:.1f} of {limit / MBIT:.0f} Mbit/s"
            assert lowest <= limit * (1 + TOLERANCE), reported
            if highest >= limit * (1 - TOLERANCE):
                if unproved.pop(device, None):
                    print(reported)
            else:
                bucket = token_bucket(limit)
                assert bucket is not None
                assert min(each.queues[device].backlog for each in looks) < bucket.queue // 2, reported
        if not unproved:
            return
    print(f"not kept full, so not conclusive: {unproved}")


async def test_limits_hold_in_each_direction_and_together(directory: Path, frame_program: Path) -> None:
    """5, 20 and 100 Mbit/s, each for a guest of its own: all downloads, then all uploads, then all at once."""
    rates = {"five": 5, "twenty": 20, "hundred": 100}
    async with appliance_in_world(directory) as (appliance, world):
        downloads: dict[str, Any] = {}
        uploads: dict[str, Any] = {}
        guests = []
        for name, rate in rates.items():
            network = {"bandwidth_download": f"{rate}mbps", "bandwidth_upload": f"{rate}mbps"}
            before = set(appliance.namespace.links())
            made = await appliance.create(name, network=network)
            guests.append(Guest(appliance, name, made["network"]))
            await guests[-1].learn(frame_program)
            for link in set(appliance.namespace.links()) - before:
                (uploads if link.startswith("hmu-") else downloads)[link] = rate * MBIT
        with world.serving(SINK):
            async with downloading(world, guests, [*rates.values()]):
                await measure(appliance, downloads)
            async with uploading(guests):
                await measure(appliance, uploads)
            async with downloading(world, guests, [*rates.values()]), uploading(guests):
                await measure(appliance, downloads | uploads)
        for name in rates:
            stats = await appliance.get(f"/instances/{name}/stats")
            assert min(stats["network_rx_bytes"], stats["network_tx_bytes"]) > 1_000_000


@asynccontextmanager
async def downloading(world: World, guests: list[Guest], rates: list[int]) -> AsyncIterator[None]:
    """Datagrams from the world, half as many again as may pass, in answer to one from each guest."""
    with ExitStack() as floods:
        for port, (guest, rate) in enumerate(zip(guests, rates, strict=True), 7001):
            floods.enter_context(world.serving(FLOOD, str(port), str(rate * MBIT * 1.5)))
            await guest.send(guest.udp(ADDRESS, b"hello", port=port))
        yield


@asynccontextmanager
async def uploading(guests: list[Guest]) -> AsyncIterator[None]:
    """Two connections each, for one alone takes its time after a loss."""
    for guest in guests:
        await guest.sh(f"for i in 1 2; do nc {ADDRESS} 9 < /dev/zero > /dev/null 2>&1 & done")
    try:
        yield
    finally:
        for guest in guests:
            await guest.sh("killall nc")
