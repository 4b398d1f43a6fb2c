"""Starts a guest on QEMU with nothing else of ours: the guest's tests need no driver, store or server.

Command line after the recommendations for TCG: q35, an uncompressed kernel, a virtio-serial port for the agent.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from hypeman.guest.boot import BootConfig, render_boot_disk
from hypeman.guest.client import GuestClient
from hypeman.guest.protocol import AGENT_PORT_NAME, LOG_PORT_NAME
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.qemu import config as native
from tests.machine import MACHINE

BOOT_SECONDS = 120
CPU = native.EMULATORS[MACHINE].cpu
"""As the driver chooses for TCG; ``max`` would make the kernel copy byte by byte (ERMS), which TCG is slow at."""
_BOARD = native.BOARDS[MACHINE][HypervisorKind.QEMU]


class Guest(msgspec.Struct):
    """A running guest: its process, its console log, how to reach its agent."""

    process: trio.Process
    directory: Path
    config: BootConfig

    @property
    def console(self) -> bytes:
        return (self.directory / "console.log").read_bytes()

    @property
    def boot_disk(self) -> bytes:
        return (self.directory / "boot.raw").read_bytes()

    async def open_channel(self) -> trio.SocketStream:
        """The agent's byte stream, as soon as QEMU listens."""
        with trio.fail_after(BOOT_SECONDS):
            while True:
                try:
                    return await trio.open_unix_socket(str(self.directory / "agent.sock"))
                except OSError:
                    await trio.sleep(0.01)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[GuestClient]:
        """A client on a fresh connection, served until the context is left."""
        stream = await self.open_channel()
        client = GuestClient(stream, nonce=self.config.nonce)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, client)
            with trio.fail_after(BOOT_SECONDS):
                await client.wait_ready()
            yield client
            nursery.cancel_scope.cancel()

    async def wait_exit(self) -> None:
        with trio.fail_after(BOOT_SECONDS):
            await self.process.wait()


async def _serve(client: GuestClient) -> None:
    try:
        await client.run()
    except Exception:  # its callers learn why from their own calls
        return


def make_overlay(path: Path, size: str = "256M") -> Path:
    subprocess.run(["truncate", "-s", size, path], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", path], check=True)
    return path


@asynccontextmanager
async def run_guest(
    config: BootConfig,
    root: Path,
    directory: Path,
    *,
    initrd: Path,
    memory_mb: int = 256,
    disks: Sequence[tuple[str, Path, bool]] = (),
    extra: Sequence[str] = (),
    log_port: bool = True,
) -> AsyncIterator[Guest]:
    """Boot ``config`` with the EROFS (or ext4) ``root``; the process is gone when the context is left.

    ``disks`` are (id, file, read-only) beside root, overlay and boot disk.
    """
    (directory / "boot.raw").write_bytes(render_boot_disk(config))
    overlay = directory / "overlay.raw"
    all_disks = [("boot", directory / "boot.raw", False), ("root", root, True), *disks]
    if config.overlay:
        if not overlay.exists():
            make_overlay(overlay)
        all_disks.append(("overlay", overlay, False))
    command = [
        MACHINE.qemu, "-M", f"{_BOARD.type},{_BOARD.options}", "-accel", "tcg,thread=multi,tb-size=64",
        "-cpu", CPU, "-m", f"{memory_mb}M", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none",
        "-no-reboot", "-kernel", str(Path(initrd).parent / MACHINE.kernel_file), "-initrd", str(initrd),
        "-append", native.kernel_cmdline(machine=MACHINE),
        "-chardev", f"file,id=ser,path={directory}/console.log,append=on", "-serial", "chardev:ser",
        "-device", "virtio-serial-pci", "-chardev", f"socket,id=ag,path={directory}/agent.sock,server=on,wait=off",
        "-device", f"virtserialport,chardev=ag,name={AGENT_PORT_NAME}",
        *(["-chardev", f"file,id=log,path={directory}/console.log,append=on"] if log_port else []),
        *(["-device", f"virtserialport,chardev=log,name={LOG_PORT_NAME}"] if log_port else []),
        "-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off",
        "-device", "pcie-root-port,id=rp1,chassis=1,slot=1",
    ]  # fmt: skip
    for disk_id, path, readonly in all_disks:
        options = "read-only=on,file.locking=off" if readonly else "cache=writeback"
        command += ["-drive", f"if=none,id=d-{disk_id},file={path},format=raw,{options}"]
        command += ["-device", f"virtio-blk-pci,drive=d-{disk_id},serial={disk_id}"]
    process = await trio.lowlevel.open_process([*command, *extra], stderr=None)
    try:
        with trio.fail_after(BOOT_SECONDS):
            while not (directory / "agent.sock").exists():
                await trio.sleep(0.01)
        yield Guest(process, directory, config)
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
