"""QEMU by hand, restoring a capture of the server: what a restore costs without anything of ours around it.

    ip netns exec NAME python -m tests.bench.bare_qemu CAPTURE DISKS

The command line is that of the driver, with memory mapped privately; QEMU runs as root, outside of all walls, with a
TAP that leads nowhere and copies of the disks in DISKS. For each line on standard input the capture is restored once,
until the guest's agent has answered; the answer is a line with the milliseconds, and those of CPU that QEMU took.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from hypeman.architecture import HOST
from hypeman.guest.protocol import ACK_MAGIC, Connection
from hypeman.host.links import TAP_FLAGS, TUN_DEVICE, TUNSETIFF
from hypeman.hypervisor import captures
from hypeman.hypervisor.interface import Capture
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.qemu import config as native
from hypeman.hypervisor.qemu.client import QmpClient, connect_unix
from tests.bench.harness import cpu_of_tasks


def main(capture: Path, disks: Path) -> None:
    saved = captures.read(capture)
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="hm-bare-") as folder:
            print(*trio.run(_restore, capture, saved, disks, Path(folder)), flush=True)


async def _restore(directory: Path, saved: Capture, disks: Path, folder: Path) -> tuple[float, float]:
    devices_alone = captures.DEVICES in saved.files
    state = directory / (captures.DEVICES if devices_alone else captures.STATE)
    with contextlib.ExitStack() as opened:
        fds = _open_all(saved, directory, disks, folder, lambda fd: opened.callback(os.close, fd))
        state_fd = os.open(state, os.O_RDONLY)
        opened.callback(os.close, state_fd)
        begin = time.perf_counter()
        argv = native.command_line(
            saved.config,
            fds,
            binary="qemu-system-x86_64",
            board=native.BOARDS[HOST][HypervisorKind(saved.kind)],
            accelerator=native.EMULATORS[HOST],
            incoming=True,
            private_memory=True,
            devices_alone=devices_alone,
        )
        process = subprocess.Popen(argv, pass_fds=fds.all(), stdin=subprocess.DEVNULL)
        try:
            qmp = await QmpClient.connect(str(folder / "qmp"))
            names = {"x-ignore-shared": not devices_alone, "events": True}
            switches = [{"capability": name, "state": state} for name, state in names.items()]
            await qmp.execute("migrate-set-capabilities", {"capabilities": switches})
            await qmp.execute("getfd", {"fdname": "state"}, fds=[state_fd])
            await qmp.execute("migrate-incoming", {"uri": "fd:state"})
            await qmp.wait_event(lambda e: e.name == "MIGRATION" and e.data["status"] in ("completed", "failed"))
            await qmp.execute("cont")
            await _agent_answers(str(folder / "agent"))
            return (time.perf_counter() - begin) * 1000, cpu_of_tasks(process.pid) * 1000
        finally:
            process.kill()
            process.wait()


def _open_all(
    saved: Capture, directory: Path, disks: Path, folder: Path, keep: Callable[[int], object]
) -> native.Descriptors:
    def kept(fd: int) -> int:
        keep(fd)
        return fd

    def listen(name: str) -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(folder / name))
            sock.listen()
            return kept(sock.detach())

    config = saved.config
    return native.Descriptors(
        qmp=listen("qmp"),
        agent=listen("agent"),
        console=kept(os.open(folder / "console", os.O_WRONLY | os.O_CREAT)),
        memory=kept(os.open(directory / captures.MEMORY, os.O_RDWR)),
        disks={
            disk.id: kept(os.open(disk.path, os.O_RDONLY))
            if disk.readonly
            else kept(os.open(disks / Path(disk.path).name, os.O_RDWR))
            for disk in config.disks
        },
        nics={nic.id: kept(_tap(f"bare{number}")) for number, nic in enumerate(config.nics)},
    )


def _tap(name: str) -> int:
    """It disappears with its last descriptor."""
    fd = os.open(TUN_DEVICE, os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
    return fd


async def _agent_answers(path: str) -> None:
    """To a greeting; what follows needs the nonce of the guest's boot."""
    stream = await connect_unix(path)
    received = bytearray()
    with contextlib.closing(stream.socket):
        await stream.send_all(Connection(os.urandom(16)).data_to_send())
        while ACK_MAGIC not in received:
            received += await stream.receive_some(4096)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
