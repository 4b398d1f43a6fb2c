"""Network interfaces of a real QEMU guest: on a TAP handed over as a descriptor, through capture and restore."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import Nic
from hypeman.hypervisor.kvm import KvmProof
from hypeman.hypervisor.qemu.driver import QemuDriver
from tests.conformance.check_driver import Guest, ending
from tests.hypervisor.conftest import MakeConfig

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_CLONE_NEWNET = 0x40000000


class Taps:
    """TAPs in a network namespace of their own, which is gone with this object."""

    def __init__(self) -> None:
        self._namespace = self._in_thread(self._new_namespace)

    async def open(self, name: str) -> int:
        return self._in_thread(lambda: self._open(name))

    def close(self) -> None:
        os.close(self._namespace)

    def _new_namespace(self) -> int:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "a network namespace cannot be made")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def _open(self, name: str) -> int:
        ctypes.CDLL(None).setns(self._namespace, _CLONE_NEWNET)
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        return fd

    def _in_thread(self, function: object) -> int:
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(function()))  # type: ignore[operator]
        thread.start()
        thread.join()
        return results[0]


@pytest.fixture
def taps() -> Iterator[Taps]:
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("requires root and /dev/net/tun")
    made = Taps()
    yield made
    made.close()


async def wait_link(guest: Guest, carrier: str) -> None:
    """The guest hears of its cable by an interrupt, some moments later."""

    async def is_so() -> bool:
        return await guest.ask("link") == carrier

    await guest.until(is_so)


@pytest.mark.real
async def test_links_are_down_until_a_restored_guest_has_its_identity(
    make_config: MakeConfig, guest_files: tuple[Path, Path], processes: Processes, taps: Taps, tmp_path: Path
) -> None:
    """A fork wakes up with the address of its source, so it must not reach the network before it got its own."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    driver = QemuDriver(processes, taps.open, kvm=KvmProof(processes, kernel=str(guest_files[0])))
    await driver.probe()

    def config(name: str, mac: str) -> object:
        return msgspec.structs.replace(make_config(name), nics=(Nic("net0", f"tap-{name}", mac),))

    directory = tmp_path / "capture"
    directory.mkdir()
    with trio.fail_after(120):
        async with ending(await driver.launch(config("one", "02:00:00:00:00:01"))) as vmm:  # type: ignore[arg-type]
            guest = await Guest.of(vmm)
            assert await guest.ask("mac") == "02:00:00:00:00:01"
            await wait_link(guest, "1")
            await vmm.set_link("net0", up=False)
            await wait_link(guest, "0")
            await vmm.set_link("net0", up=True)
            await wait_link(guest, "1")
            await vmm.capture(directory)
        restored = await driver.restore(
            config("two", "02:00:00:00:00:02"),  # type: ignore[arg-type]
            directory,
            keep_capture=True,
            paused=True,
        )
        async with ending(restored) as vmm:
            await vmm.resume()
            guest = await Guest.of(vmm)
            await wait_link(guest, "0")
            await vmm.set_link("net0", up=True)
            await wait_link(guest, "1")
            assert await guest.ask("mac") == "02:00:00:00:00:01", "the agent's to change: it is in the saved state"
