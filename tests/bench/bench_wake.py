"""Wakes from standby by traffic: how many, how many lost, and how long the first byte takes.

Real guests on a real server. Each is put in standby and asked at once, in turn over HTTP, over raw TCP with data
behind the handshake, and over UDP; from the host, from the world through a published port, and from a neighbour. An
answer that is wrong or missing is lost. HYPEMAN_BENCH_WAKES sets the number.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from tests.bench.harness import Result
from tests.real.appliance import PATIENCE, Appliance, Namespace, short_directory
from tests.real.world import World, appliance_in_world

WAKES = int(os.environ.get("HYPEMAN_BENCH_WAKES", "36"))
GUESTS = 2
HOST = "192.0.2.2"
SETTINGS = {"NETWORK__GUEST_TO_GUEST": "true"}

KINDS = ("http", "tcp", "udp")
PLACES = ("host", "world", "neighbour")

PEER = """
import socket, sys, time
for line in sys.stdin:
    kind, address, port, text = line.split()
    begin = time.monotonic()
    try:
        if kind == "udp":
            connection = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            connection.settimeout(60)
            connection.connect((address, int(port)))
            connection.send(text.encode())
        else:
            connection = socket.create_connection((address, int(port)), timeout=60)
            request = f"GET /{text} HTTP/1.0\\r\\n\\r\\n" if kind == "http" else text
            connection.sendall(request.encode())
        got = connection.recv(2000).split(b"\\r\\n")[0].decode()
        connection.close()
    except OSError as error:
        got = repr(error)
    print(f"{time.monotonic() - begin:.4f} {got}", flush=True)
"""


class Peer:
    """A client in a namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self._process = subprocess.Popen(
            namespace.command("python3", "-c", PEER), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def ask(self, kind: str, address: str, port: int, text: str) -> tuple[float, str]:
        """Seconds to the first bytes of the answer, and its first line."""

        def ask() -> str:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(f"{kind} {address} {port} {text}\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()

        seconds, _, answer = (await trio.to_thread.run_sync(ask)).strip().partition(" ")
        return float(seconds or 0), answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Tally:
    def __init__(self) -> None:
        self.wakes: Counter[str] = Counter()
        self.lost: list[str] = []
        self.first_byte: list[float] = []
        self.restore: list[float] = []


async def neighbour_asks(appliance: Appliance, kind: str, address: str, port: int, text: str) -> tuple[float, str]:
    begin = time.monotonic()
    request = f"GET /{text} HTTP/1.0\\r\\n\\r" if kind == "http" else text
    if kind == "udp":
        command = f"printf {text} | /echo {address} {port}"
    else:
        command = f"(printf '{request}\\n'; sleep 2) | nc -w 60 {address} {port} | head -n 1"
    _, answer = await appliance.exec("neighbour", "sh", "-c", command)
    return time.monotonic() - begin, answer.strip()


async def wake_all(tally: Tally) -> None:
    for directory in short_directory("bench"):
        async with appliance_in_world(directory, **SETTINGS) as (appliance, world):
            await prepare(appliance)
            counter = itertools.count()
            async with trio.open_nursery() as nursery:
                for number in range(GUESTS):
                    nursery.start_soon(one_guest, appliance, world, number, counter, tally)


async def prepare(appliance: Appliance) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "echo"
        source = Path(__file__).parents[1] / "real" / "echo.c"
        subprocess.run([shutil.which("cc") or "gcc", "-O1", "-static", "-s", "-o", program, source], check=True)
        echo = program.read_bytes()
    main = "touch /ok; httpd -p 80 -h /; until [ -x /echo ]; do sleep 0.1; done; exec /echo"
    policy = {"enabled": True, "idle_timeout": "10h"}
    for name in [*(f"vm{number}" for number in range(GUESTS)), "neighbour"]:
        number = int(name[2:]) if name.startswith("vm") else 9
        ports = [
            {"host_port": 7000 + number, "guest_port": 7, "protocol": "tcp"},
            {"host_port": 7000 + number, "guest_port": 7, "protocol": "udp"},
            {"host_port": 8000 + number, "guest_port": 80, "protocol": "tcp"},
        ]
        rates = {"bandwidth_download": "1gbps", "bandwidth_upload": "1gbps"}
        await appliance.create(name, cmd=["sh", "-c", main], auto_standby=policy, ports=ports, network=rates)
        code, told = await appliance.exec(name, "sh", "-c", "cat > /e; chmod +x /e; mv /e /echo", stdin=echo)
        assert code == 0, told
    await trio.sleep(2)


async def one_guest(appliance: Appliance, world: World, number: int, counter: Iterator[int], tally: Tally) -> None:
    name = f"vm{number}"
    ip = (await appliance.get(f"/instances/{name}"))["network"]["ip"]
    host, outside = Peer(appliance.namespace), Peer(world)
    try:
        while (count := next(counter)) < WAKES:
            kind, place = KINDS[count % 3], PLACES[count // 3 % 3]
            await appliance.post(f"/instances/{name}/standby")
            before = await last_wake(appliance, name)
            text = "ok" if kind == "http" else f"wake{count}"
            port = 80 if kind == "http" else 7
            if place == "host":
                seconds, answer = await host.ask(kind, ip, port, text)
            elif place == "world":
                outer = (8000 if kind == "http" else 7000) + number
                seconds, answer = await outside.ask(kind, HOST, outer, text)
            else:
                seconds, answer = await neighbour_asks(appliance, kind, ip, port, text)
            tally.wakes[f"{kind} from {place}"] += 1
            if "200 OK" not in answer if kind == "http" else answer != text:
                tally.lost.append(f"{kind} from {place}: {answer!r}")
                state = (await appliance.get(f"/instances/{name}"))["state"]
                if state != "Running":
                    await appliance.post(f"/instances/{name}/restore")
                continue
            with trio.fail_after(PATIENCE):
                while (last := await last_wake(appliance, name)) == before:
                    await trio.sleep(0.02)
            tally.restore.append(last["milliseconds"] / 1000)
            if place != "neighbour":  # there, the time of an exec is in it
                tally.first_byte.append(seconds)
    finally:
        host.close()
        outside.close()


async def last_wake(appliance: Appliance, name: str) -> Any:
    return (await appliance.get(f"/instances/{name}/auto-standby/status"))["last_wake"]


def run() -> Iterator[Result]:
    tally = Tally()
    trio.run(wake_all, tally)
    for line in tally.lost:
        print("lost:", line)
    yield Result("wakes by traffic", float(sum(tally.wakes.values())), "wakes")
    yield Result("wakes by traffic, lost", float(len(tally.lost)), "wakes")
    first, restore = statistics.median(tally.first_byte), statistics.median(tally.restore)
    yield Result("first byte of an answer that wakes", first * 1000, "ms", "the wake itself", restore * 1000)
