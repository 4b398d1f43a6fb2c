"""The agent in a real guest (QEMU without KVM): boot phases, exec, copy, memory, sizes.

The peer of an exec is what the guest itself needs for the same program: a shell in the guest runs it in a
loop and reports how long one took, so the ratio is what the channel adds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import trio

from hypeman.guest.boot import BootConfig
from hypeman.guest.client import GuestClient
from hypeman.guest.initrd import INIT
from hypeman.guest.programs import ExecResult
from hypeman.guest.types import CopyEntry, CopyToRequest, ExecRequest
from tests.bench.harness import Result
from tests.guest.qemu import run_guest

TOP = Path(__file__).parents[2]
EXECS = 200
COPY_BYTES = 64 * 1024 * 1024
_LOOP = """
read begin rest < /proc/uptime
i=0; while [ $i -lt 200 ]; do /bin/busybox true; i=$((i+1)); done
read end rest < /proc/uptime
echo $begin $end"""


def run() -> list[Result]:
    if shutil.which("qemu-system-x86_64") is None:
        return []
    with tempfile.TemporaryDirectory() as directory:
        return trio.run(_measure, Path(directory))


async def _measure(directory: Path) -> list[Result]:
    kernel, root = directory / "kernel", directory / "root.erofs"
    kernel.mkdir()
    _make_inputs(directory, kernel, root)
    config = BootConfig(
        instance_id="bench",
        hostname="bench",
        nonce=secrets.token_bytes(16),
        argv=("sleep", "1000"),
        env=("PATH=/bin",),
        overlay=False,
    )
    begin = time.perf_counter()
    async with (
        run_guest(config, root, directory, initrd=kernel / "initrd.cpio", memory_mb=512) as guest,
        guest.connect() as client,
    ):
        boot = time.perf_counter() - begin
        ready = client.ready
        assert ready is not None
        init_ms = ready.phases_ms["ready"] - ready.phases_ms["kernel"]
        trips = [await _exec_seconds(client) for _ in range(EXECS)]
        up, down = await _copy_rates(client)
        return [
            Result("guest: QEMU start to agent ready", boot * 1000, "ms"),
            Result("guest: init's own share of the boot", init_ms, "ms"),
            Result(
                "guest: exec true, round trip",
                statistics.median(trips) * 1000,
                "ms",
                "in the guest's shell",
                await _shell_seconds(client) * 1000,
            ),
            Result("guest: copy in", up, "MB/s"),
            Result("guest: copy out", down, "MB/s"),
            Result("guest: memory of init and agent", await _agent_memory(client) / 1024, "KB"),
            Result("guest: init on disk", INIT.stat().st_size / 1024, "KB"),
            Result("guest: initrd", (kernel / "initrd.cpio").stat().st_size / 1024, "KB"),
        ]


def _make_inputs(directory: Path, kernel: Path, root: Path) -> None:
    subprocess.run([TOP / "packaging/kernel/choose", kernel], cwd=TOP, check=True, stdout=subprocess.DEVNULL)
    tree = directory / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    for applet in ("sh", "true", "sleep", "grep"):
        (tree / "bin" / applet).symlink_to("busybox")
    subprocess.run(["mkfs.erofs", "--quiet", root, tree], check=True, capture_output=True)


async def _run(client: GuestClient, *argv: str) -> bytes:
    output = b""
    async with await client.exec(ExecRequest(argv=argv)) as session:
        while not isinstance(got := await session.receive(), ExecResult):
            output += got.data
    assert got.exit_code == 0, got
    return output


async def _exec_seconds(client: GuestClient) -> float:
    begin = time.perf_counter()
    await _run(client, "/bin/true")
    return time.perf_counter() - begin


async def _shell_seconds(client: GuestClient) -> float:
    """Seconds that one `true` takes in the guest, without us."""
    begin, end = map(float, (await _run(client, "sh", "-c", _LOOP)).split())
    return (end - begin) / 200


async def _copy_rates(client: GuestClient) -> tuple[float, float]:
    """MB/s into and out of the guest's memory file system, the middle of three each."""
    block = os.urandom(1024 * 1024)
    ups, downs = [], []
    for _ in range(3):
        begin = time.perf_counter()
        async with await client.copy_to(CopyToRequest(path="/dev/shm/file")) as copy:
            for _ in range(COPY_BYTES // len(block)):
                await copy.send(block)
            await copy.finish()
        ups.append(COPY_BYTES / 1e6 / (time.perf_counter() - begin))
        begin, total = time.perf_counter(), 0
        async with client.copy_from("/dev/shm/file") as tree:
            async for item in tree:
                total += 0 if isinstance(item, CopyEntry) else len(item)
        assert total == COPY_BYTES
        downs.append(COPY_BYTES / 1e6 / (time.perf_counter() - begin))
    return statistics.median(ups), statistics.median(downs)


async def _agent_memory(client: GuestClient) -> int:
    text = (await _run(client, "grep", "VmRSS", "/proc/1/status")).split()
    return int(text[1]) * 1024
