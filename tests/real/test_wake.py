"""Packets and requests bring real guests back from standby: from the host, the world, a neighbour; TCP, UDP, ping."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance, Namespace, check_host, short_directory
from tests.real.world import World, appliance_in_world

pytestmark = [pytest.mark.real, pytest.mark.slow]

HOST = "192.0.2.2"
"""The appliance's address in the world."""

ECHO = ["sh", "-c", "until [ -x /echo ]; do sleep 0.1; done; exec /echo"]

PEER = """
import socket, sys
kind, address, port, text = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()
if kind == "ping":
    connection = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    connection.settimeout(60)
    head = bytes([8, 0, 0, 0, 0, 7, 0, 1]) + text + b" " * (len(text) % 2)
    total = sum(int.from_bytes(head[at : at + 2], "big") for at in range(0, len(head), 2))
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    connection.sendto(head[:2] + total.to_bytes(2, "big") + head[4:], (address, 0))
    while (answer := connection.recv(100))[20] != 0:
        pass
    print(answer[28:].decode().strip(), flush=True)
    sys.exit()
if kind == "udp":
    connection = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    connection.settimeout(60)
    connection.connect((address, port))
    connection.send(text)
else:
    connection = socket.create_connection((address, port), timeout=60)
    connection.settimeout(60)
    connection.sendall(text)
print(connection.recv(100).decode(), flush=True)
if kind == "open":
    sys.stdin.readline()
    connection.sendall(b"again")
    print(connection.recv(100).decode(), flush=True)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("wake")


@pytest.fixture(scope="session")
def echo_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("echo") / "echo"
    subprocess.run([compiler, "-O1", "-static", "-s", "-o", program, Path(__file__).with_name("echo.c")], check=True)
    return program.read_bytes()


@pytest.fixture
async def awake(directory: Path, echo_program: bytes) -> AsyncIterator[tuple[Appliance, World, Any]]:
    """An instance that echoes, with a published port, and neighbours that may reach it."""
    async with appliance_in_world(directory, NETWORK__GUEST_TO_GUEST="true") as (appliance, world):
        policy = {"enabled": True, "idle_timeout": "1h", "wake": "all", "ignore_destination_ports": [9]}
        ports = [{"host_port": 7007, "guest_port": 7, "protocol": each} for each in ("tcp", "udp")]
        made = await appliance.create("one", cmd=ECHO, auto_standby=policy, ports=ports)
        code, text = await appliance.exec("one", "sh", "-c", "cat > /e; chmod +x /e; mv /e /echo", stdin=echo_program)
        assert code == 0, text
        with trio.fail_after(PATIENCE):
            while await ask(appliance.namespace, "tcp", made["network"]["ip"], 7, "ready") != "ready":
                await trio.sleep(0.2)
        yield appliance, world, made


async def sleep(appliance: Appliance) -> Any:
    """Put it in standby; returns who woke it last."""
    await appliance.post("/instances/one/standby")
    assert (await appliance.get("/instances/one"))["state"] == "Standby"
    return await last_wake(appliance)


async def ask(namespace: Namespace, kind: str, address: str, port: int, text: str) -> str:
    """What a peer in ``namespace`` gets for ``text``."""
    with trio.fail_after(PATIENCE):
        argv = namespace.command("python3", "-c", PEER, kind, address, str(port), text)
        result = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
        while await _connections(namespace, address):
            await trio.sleep(0.05)  # what is sent again when the guest is in standby would wake it
    return (result.stdout or result.stderr.splitlines()[-1]).decode().strip()


async def _connections(namespace: Namespace, address: str) -> bytes:
    argv = namespace.command(*["ss", "-Hnt", "state", "connected", "exclude", "time-wait", "dst"], address)
    result = await trio.run_process(argv, capture_stdout=True)
    return result.stdout


async def woken_by(appliance: Appliance, *, before: Any = None) -> str:
    """Who woke it last, after ``before``; it runs. What woke it is recorded when the restore has ended."""
    with trio.fail_after(PATIENCE):
        while (last := await last_wake(appliance)) == before or last is None:
            await trio.sleep(0.05)
    assert (await appliance.get("/instances/one"))["state"] == "Running"
    assert "error" not in last and last["milliseconds"] > 0
    return str(last["by"])


async def line(stream: trio.abc.ReceiveStream) -> bytes:
    read = b""
    while not read.endswith(b"\n"):
        read += await stream.receive_some(1)
    return read


async def last_wake(appliance: Appliance) -> Any:
    return (await appliance.get("/instances/one/auto-standby/status"))["last_wake"]


async def test_packets_wake(awake: tuple[Appliance, World, Any]) -> None:
    appliance, world, made = awake
    ip = made["network"]["ip"]
    for namespace, address, port in (
        (appliance.namespace, ip, 7),
        (world, HOST, 7007),
        (appliance.namespace, HOST, 7007),
    ):
        for kind in ("tcp", "udp"):
            before = await sleep(appliance)
            assert await ask(namespace, kind, address, port, f"{kind} to {port}") == f"{kind} to {port}"
            assert (await woken_by(appliance, before=before)).startswith(f"{kind} from ")
    before = await sleep(appliance)
    assert await ask(appliance.namespace, "ping", ip, 0, "hello") == "hello"
    assert await woken_by(appliance, before=before) == "icmp from 10.100.0.1"
    seen = await appliance.get("/events?follow=false&type=instance.woken")
    assert seen[-1]["data"]["by"] == "icmp from 10.100.0.1"


async def test_an_open_connection_a_neighbour_and_the_api_wake(awake: tuple[Appliance, World, Any]) -> None:
    appliance, world, made = awake
    ip = made["network"]["ip"]
    argv = world.command("python3", "-c", PEER, "open", HOST, "7007", "first")
    process = await trio.lowlevel.open_process(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    with trio.fail_after(PATIENCE):
        assert await line(process.stdout) == b"first\n"
        await sleep(appliance)
        await process.stdin.send_all(b"\n")
        assert await line(process.stdout) == b"again\n"
        await process.wait()

    await appliance.create("two")
    before = await sleep(appliance)
    code, text = await appliance.exec("two", "sh", "-c", f"(echo from two; sleep 3) | nc -w 60 {ip} 7")
    assert (code, text) == (0, "from two\n")
    assert (await woken_by(appliance, before=before)).startswith("tcp from 10.100.0.")

    for wake, answer in (
        ("exec", appliance.exec("one", "echo", "up")),
        ("stat", appliance.get("/instances/one/stat?path=/echo")),
    ):
        before = await sleep(appliance)
        await answer
        assert await woken_by(appliance, before=before) == wake
    await appliance.delete("/instances/two")


async def test_what_does_not_wake(awake: tuple[Appliance, World, Any]) -> None:
    """Ignored ports, addresses that are not published; the server is killed in between; a wake that fails."""
    appliance, world, made = awake
    ip = made["network"]["ip"]
    before = await sleep(appliance)
    scan = "import socket\nfor port in (9, 9):\n c = socket.socket(); c.settimeout(1); print(c.connect_ex((%r, port)))"
    for namespace, address in ((appliance.namespace, ip), (world, ip)):
        namespace.run("python3", "-c", scan % address)
    world.run("python3", "-c", scan.replace("(9, 9)", "(7007, 7)") % "10.100.255.255")
    assert (await appliance.get("/instances/one"))["state"] == "Standby"

    appliance.kill()
    await appliance.start()
    assert (await appliance.get("/instances/one"))["state"] == "Standby"
    assert await ask(world, "tcp", HOST, 7007, "after a crash") == "after a crash"
    assert (await woken_by(appliance, before=before)).startswith("tcp from 192.0.2.1 ")

    await sleep(appliance)
    for capture in (appliance.data / "captures").iterdir():
        for file in capture.iterdir():
            file.unlink()
    assert "refused" in await ask(world, "tcp", HOST, 7007, "hello")
    assert "refused" in await ask(world, "udp", HOST, 7007, "hello")
    last = await last_wake(appliance)
    assert last["error"]
    await appliance.delete("/instances/one")
    with trio.fail_after(PATIENCE):
        while "hm-wake" in appliance.namespace.links():
            await trio.sleep(0.2)
