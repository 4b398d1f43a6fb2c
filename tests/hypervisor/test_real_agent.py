"""The guest agent itself on every real VMM with KVM: how it is reached, and what it does around a saved state.

The program runs, its guest is reached (virtio-serial or vsock), it reaches the host by network, sleeps, wakes, is
copied, is given a disk. Requires KVM, root and its own network namespace, since Firecracker opens TAPs by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.guest.boot import BootConfig, GuestNetwork, GuestVolume, render_boot_disk
from hypeman.guest.client import GuestClient
from hypeman.guest.failures import GuestLost
from hypeman.guest.programs import ExecResult
from hypeman.guest.types import ExecRequest
from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import Capabilities, Disk, Driver, Nic, VmConfig, Vmm
from hypeman.hypervisor.kinds import HypervisorKind
from tests.conformance.check_driver import ending
from tests.hypervisor.conftest import config_maker
from tests.hypervisor.real import REAL_KINDS, SLOWNESS, real_driver

pytestmark = [pytest.mark.real, pytest.mark.parametrize("kind", REAL_KINDS, ids=lambda kind: str(kind.value))]

_TUNSETIFF = 0x400454CA
_TAP_NO_PI_VNET_HDR = 0x5002
_MODE = ("mode", "tap", "vnet_hdr")
_PORT = 8000
_PATIENCE = 60 * SLOWNESS
NONCE = secrets.token_bytes(16)


class Place:
    """A folder with disks, and TAPs of two guests in our namespace: 10.9.N.1 here, 10.9.N.2 there."""

    def __init__(self, folder: Path, kernel: Path, initrd: Path) -> None:
        self.folder = folder
        self._make = config_maker(folder, kernel, initrd)
        self._numbers: dict[str, int] = {}
        tree = folder / "tree"
        for name in ("bin", "tmp", "etc", "data"):
            (tree / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", tree / "bin/busybox")
        for applet in ("sh", "cat", "wget", "echo", "sleep", "ls"):
            (tree / "bin" / applet).symlink_to("busybox")
        tree.chmod(0o755)
        self.root = folder / "root.erofs"
        subprocess.run(["mkfs.erofs", "--quiet", "--all-root", self.root, tree], check=True, capture_output=True)

    def network(self, name: str) -> GuestNetwork:
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return GuestNetwork(f"02:00:00:00:09:{number:02x}", f"10.9.{number}.2", 24, gateway=f"10.9.{number}.1")

    def config(self, driver: Driver, name: str) -> VmConfig:
        """A guest of that name with all of its disks, and its TAP."""
        able, network = driver.capabilities, self.network(name)
        config = self._make(name)
        own = self.folder / name
        overlay, boot = own / "layer.raw", own / "boot.raw"
        disks = (
            Disk("root", str(self.root), readonly=True, shared=True),
            Disk("overlay", str(overlay)),
            Disk("boot", str(boot)),
        )
        if not overlay.exists():
            _format(overlay, 64)
            reported = BootConfig(
                instance_id=name, hostname=name, nonce=NONCE, argv=("/bin/sleep", "100000"), env=("PATH=/bin",),
                network=network, power_off_by_reset=not able.power_off,
                disk_order=() if able.disk_serials else tuple(disk.id for disk in disks),
            )  # fmt: skip
            boot.write_bytes(render_boot_disk(reported))
            tap = f"tap-{name}"
            _ip("tuntap", "add", tap, *_MODE, "user", str(config.uid))
            _ip("address", "add", f"{network.gateway}/24", "dev", tap)
            _ip("link", "set", tap, "up")
        return msgspec.structs.replace(
            config,
            cmdline=driver.kernel_cmdline(hotplug_memory=False),
            disks=disks,
            nics=(Nic("net0", f"tap-{name}", network.mac),),
        )

    def taken_down(self) -> None:
        for name in self._numbers:
            _ip("tuntap", "del", f"tap-{name}", *_MODE)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _format(path: Path, mib: int) -> None:
    path.touch(mode=0o600)
    os.truncate(path, mib << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", path], check=True)


async def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_NO_PI_VNET_HDR))
    return fd


@asynccontextmanager
async def talking(vmm: Vmm) -> AsyncIterator[GuestClient]:
    """The agent of ``vmm``, on a new channel; on the next one, if it ends before the agent is ready."""

    async def serve(client: GuestClient) -> None:
        try:
            await client.run()
        except Exception:  # its callers learn why from their own calls
            return

    async with trio.open_nursery() as nursery:
        while True:
            client = GuestClient(await vmm.open_channel(), nonce=NONCE)
            nursery.start_soon(serve, client)
            with contextlib.suppress(GuestLost):
                await client.wait_ready()
                break
        yield client
        nursery.cancel_scope.cancel()


async def output_of(client: GuestClient, script: str) -> str:
    said = b""
    async with await client.exec(ExecRequest(argv=("sh", "-c", script))) as session:
        await session.close_stdin()
        while not isinstance(got := await session.receive(), ExecResult):
            said += got.data
    assert got.exit_code == 0, said
    return said.decode().strip()


async def reaches_us(client: GuestClient, network: GuestNetwork) -> None:
    """The guest gets a page from here, under the address that it should have."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(_PORT, host=network.gateway)

        async def answer(stream: trio.SocketStream) -> None:
            await stream.receive_some(4096)
            who = stream.socket.getpeername()[0].encode()
            await stream.send_all(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(who), who))
            await stream.aclose()

        nursery.start_soon(trio.serve_listeners, answer, listeners)
        assert await output_of(client, f"wget -qO- http://{network.gateway}:{_PORT}/") == network.address
        nursery.cancel_scope.cancel()


def check_walls(vmm: Vmm) -> None:
    """Its own user, no way to privileges, system calls filtered in all threads that do something; Firecracker sees
    nothing but its jail."""
    config, process = vmm.handle.config, Path("/proc", str(vmm.handle.pid))
    for thread in (process / "task").iterdir():
        status = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
        assert status["Uid"].split() == [str(config.uid)] * 4
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2" or thread.name == process.name, "the first only waits in Cloud Hypervisor"
    if vmm.handle.kind is HypervisorKind.FIRECRACKER:
        assert {"disk-root", "dev"} <= set(os.listdir(process / "root")) and not (process / "root/proc").exists()


@pytest.fixture
def place(guest_files: tuple[Path, Path], folder: Path, capabilities: Capabilities) -> Iterator[Place]:
    if capabilities.accelerator != "kvm":
        pytest.skip("requires KVM; without it the guest's own tests have the agent on QEMU")
    if os.geteuid() != 0 or os.readlink("/proc/self/ns/net") == os.readlink("/proc/1/ns/net"):
        pytest.skip("requires a network namespace of its own: unshare --net")
    made = Place(folder, *guest_files)
    yield made
    made.taken_down()


@pytest.fixture
def driver(
    kind: HypervisorKind, capabilities: Capabilities, processes: Processes, folder: Path, guest_files: tuple[Path, Path]
) -> Driver:
    made = real_driver(kind, processes, kernel=str(guest_files[0]), folder=str(folder), open_tap=open_tap)()
    made.adopt_capabilities(capabilities)
    return made


@pytest.fixture
def hotplug(kind: HypervisorKind, capabilities: Capabilities) -> None:
    """Skips where there is none; from here and not from a test that waits, whose skip would lose its reason."""
    if not capabilities.hotplug_disk:
        pytest.skip(f"{kind.value} has no hot-plug of disks")


def capture_directory(place: Place, name: str) -> Path:
    directory = place.folder / name
    directory.mkdir()
    directory.chmod(0o777)
    return directory


async def test_a_guest_works_sleeps_wakes_and_is_copied(place: Place, driver: Driver) -> None:
    one, two = place.config(driver, "one"), place.config(driver, "two")
    with trio.fail_after(_PATIENCE):
        async with ending(await driver.launch(one)) as vmm:
            async with talking(vmm) as client:
                check_walls(vmm)
                assert await output_of(client, "echo $((6 * 7)); cat /proc/sys/kernel/hostname") == "42\none"
                await reaches_us(client, place.network("one"))
                await output_of(client, "echo kept > /tmp/kept")
                await client.freeze()
            asleep = capture_directory(place, "asleep")
            await vmm.capture(asleep)
            await vmm.kill()
        async with ending(await driver.restore(one, asleep, keep_capture=False, paused=True)) as vmm:
            await vmm.resume()
            async with talking(vmm) as client:
                await client.set_identity(hostname="one", network=place.network("one"))
                await vmm.set_link("net0", up=True)
                await client.thaw()
                assert await output_of(client, "cat /tmp/kept") == "kept"
                await reaches_us(client, place.network("one"))
                await client.freeze()
            snapshot = capture_directory(place, "snapshot")
            await vmm.capture(snapshot)
            Path(two.disks[1].path).write_bytes(Path(one.disks[1].path).read_bytes())
            await vmm.resume()
            async with ending(await driver.restore(two, snapshot, keep_capture=True, paused=True)) as copy:
                await copy.resume()
                async with talking(copy) as client, talking(vmm) as source:
                    await client.set_identity(hostname="two", network=place.network("two"))
                    await copy.set_link("net0", up=True)
                    for each, name in ((client, "two"), (source, "one")):
                        await each.thaw()
                        assert await output_of(each, "cat /tmp/kept /proc/sys/kernel/hostname") == f"kept\n{name}"
                        await reaches_us(each, place.network(name))
                    await client.shutdown(grace_seconds=1)
                    await copy.wait_exit()


@pytest.mark.usefixtures("hotplug")
async def test_a_guest_mounts_what_is_plugged_in(place: Place, driver: Driver) -> None:
    volume = place.folder / "volume.raw"
    _format(volume, 8)
    with trio.fail_after(_PATIENCE):
        async with ending(await driver.launch(place.config(driver, "one"))) as vmm, talking(vmm) as client:
            await vmm.add_disk(Disk("vdata", str(volume)))
            await client.mount_volume(GuestVolume(disk_id="vdata", path="/data"))
            assert await output_of(client, "echo written > /data/file; cat /data/file") == "written"
            await client.unmount_volume("/data")
            await vmm.remove_disk("vdata")
            assert await output_of(client, "ls /data") == ""
