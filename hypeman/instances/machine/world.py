"""What the steps act on: the capabilities, the drivers and the running VMs.

Each method does or undoes one step; it is idempotent and a no-op if there is nothing to do. Data is
read from the store at execution time, so that a step read back after a crash does the same as the
one that was planned.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import trio

from hypeman.captures import records as captures
from hypeman.captures.records import CAPTURES, CaptureRow
from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.config import Config
from hypeman.errors import HypemanError, InternalError
from hypeman.guest.boot import (
    MAX_BOOT_DISK,
    BootConfig,
    CaCertificate,
    GuestVolume,
    parse_outcome,
    render_boot_disk,
)
from hypeman.guest.client import GuestLost
from hypeman.guest.limits import LIMITS
from hypeman.guest.protocol import Op
from hypeman.guest.types import Exited, Fatal
from hypeman.host.cgroups import CGroups
from hypeman.host.files import Files
from hypeman.host.safe_open import open_log, read_start
from hypeman.hypervisor.captures import MEMORY
from hypeman.hypervisor.interface import CaptureInvalid, Driver, Vmm, VmmBroken, VmmGone
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.images.types import ImageConfig
from hypeman.instances.machine.live import Connect, Live, connect_guest
from hypeman.instances.model.guest_boot import boot_config, boot_network, machine_id
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.vm import Surroundings, vm_config, vm_disks, volume_disk, volume_disk_id
from hypeman.instances.rows import INSTANCES
from hypeman.network.leases import get_lease
from hypeman.network.types import GuestNetwork, Lease
from hypeman.paths import Paths
from hypeman.store import Store, Txn
from hypeman.telemetry import metrics
from hypeman.text import one_line
from hypeman.units import parse_size

log = logging.getLogger(__name__)

DISKS = "*.raw"
"""Pattern for disks in an instance's, capture's or snapshot's directory."""
SECONDS_TO_AWAKEN = 60.0
"""A restored guest answers in 0.1 s; the limit allows for a host that swaps."""
SECONDS_TO_ANSWER = 5.0
"""For a running guest whose channel is being opened, for example after a server restart."""
SECONDS_TO_KILL = 5.0
"""After the guest was asked to power off and its grace period is over."""


class NetworkNeeds(Protocol):
    async def attach(self, lease: Lease, *, uid: int = 0) -> None: ...
    async def detach(self, lease: Lease) -> None: ...
    async def plug_in_again(self, lease: Lease, pid: int) -> bool: ...
    def guest_network(self, lease: Lease) -> GuestNetwork | None: ...


class DeviceNeeds(Protocol):
    async def bind(self, instance_id: str, *, uid: int = 0, gid: int = 0) -> None: ...
    async def unbind(self, instance_id: str) -> None: ...
    def sysfs_paths(self, instance_id: str) -> tuple[str, ...]: ...


class EgressNeeds(Protocol):
    async def enforce(self, record: InstanceRecord, lease: Lease) -> None: ...
    async def release(self, instance_id: str) -> None: ...
    def guest_setup(self, lease: Lease) -> tuple[Mapping[str, str], tuple[CaCertificate, ...]]:
        """Environment and CA certificates for a guest with mediated egress."""
        ...


class ImageNeeds(Protocol):
    def disk(self, digest: str) -> Path: ...
    def root_fs(self, digest: str) -> str: ...
    def config(self, digest: str) -> ImageConfig: ...


class TemplateNeeds(Protocol):
    async def make(self, path: Path, size: int, *, uid: int) -> None:
        """Create a formatted empty disk at ``path``."""
        ...


class CompressorNeeds(Protocol):
    def plain(self, capture_id: str) -> AbstractAsyncContextManager[None]: ...
    def schedule(self, capture_id: str, *, delay: float = 0.0) -> None: ...
    def is_busy(self, capture_id: str) -> bool: ...


class World:
    """Carries out the steps. One per server."""

    def __init__(
        self,
        *,
        config: Config,
        store: Store,
        files: Files,
        drivers: Mapping[HypervisorKind, Driver],
        cgroups: CGroups,
        kernel: str,
        initrd: str | None,
        images: ImageNeeds,
        network: NetworkNeeds,
        devices: DeviceNeeds,
        egress: EgressNeeds,
        templates: TemplateNeeds,
        compressor: CompressorNeeds,
        boot_id: str,
        connect: Connect = connect_guest,
    ) -> None:
        self.config = config
        self.paths: Paths = config.paths
        self.store = store
        self.files = files
        self.drivers = drivers
        self.cgroups = cgroups
        self.kernel = kernel
        self.initrd = initrd
        self.images = images
        self.network = network
        self.devices = devices
        self.egress = egress
        self.templates = templates
        self.compressor = compressor
        self.boot_id = boot_id
        """The host's boot id; a VMM's handle has the one it was started in."""
        self.connect = connect
        self.live: dict[str, Live] = {}
        """Instance → its running VM. Set by launch, restore and adoption; removed when the VM ends."""
        self._overtaken: set[str] = set()
        """Instances whose guests are not waited for, since a stop or delete is queued."""

    # Look-ups

    def record(self, instance_id: str) -> InstanceRecord:
        record = self.store.read(lambda txn: txn.get(INSTANCES, instance_id))
        if record is None:
            raise InternalError(f"instance {instance_id} has no record")
        return record

    def lease(self, instance_id: str) -> Lease | None:
        return self.store.read(lambda txn: get_lease(txn, instance_id))

    def uid(self, record: InstanceRecord) -> int:
        """The user id of this instance's VMM: each has its own; 0 is the server's."""
        base = self.config.hypervisor.uid_base
        return base + record.number if base else 0

    def driver(self, record: InstanceRecord) -> Driver:
        return self.drivers[record.spec.hypervisor]

    def give_up_guest(self, instance_id: str, given_up: bool) -> None:
        """Abort all waits for the guest of an instance, including its next VM's, until called with False."""
        if given_up:
            self._overtaken.add(instance_id)
        else:
            self._overtaken.discard(instance_id)
        live = self.live.get(instance_id)
        if live is not None:
            live.give_up(given_up)

    # Disks

    async def make_disks(self, instance_id: str) -> None:
        record = self.record(instance_id)
        uid = self.uid(record)
        await self._make_dirs(record)
        mine = self.paths.instance(instance_id)
        await self.templates.make(mine.overlay, record.spec.overlay_bytes, uid=uid)
        for volume in record.spec.volumes:
            if volume.overlay:
                size = parse_size(volume.overlay_size or "0")
                await self.templates.make(mine.volume_overlay(volume.volume_id), size, uid=uid)

    async def copy_disks(self, instance_id: str, source: str) -> None:
        """Copy the writable layers from directory ``source``, which must not be written to meanwhile."""
        record = self.record(instance_id)
        uid = self.uid(record)
        await self._make_dirs(record)
        await self.files.copy_all(Path(source), self.paths.instance(instance_id).root, DISKS, uid=uid, gid=uid)

    async def take_disks(self, instance_id: str, source: str) -> None:
        record = self.record(instance_id)
        uid = self.uid(record)
        await self._make_dirs(record)
        await self.files.move_all(Path(source), self.paths.instance(instance_id).root, DISKS, uid=uid, gid=uid)
        await self.files.remove(Path(source))

    async def copy_disks_away(self, instance_id: str, target: str) -> None:
        await self.files.make_dir(Path(target))
        await self.files.copy_all(self.paths.instance(instance_id).root, Path(target), DISKS)

    async def stage_disks(self, instance_id: str, source: str) -> None:
        uid = self.uid(self.record(instance_id))
        staged = self.paths.instance(instance_id).staged
        await self.files.remove(staged)
        await self.files.make_dir(staged)
        await self.files.copy_all(Path(source), staged, DISKS, uid=uid, gid=uid)

    async def unstage_disks(self, instance_id: str) -> None:
        await self.files.remove(self.paths.instance(instance_id).staged)

    async def swap_disks(self, instance_id: str) -> None:
        """Replace each disk by one rename; after a crash, those already renamed are no longer staged."""
        mine = self.paths.instance(instance_id)
        await self.files.move_all(mine.staged, mine.root, DISKS)
        await self.files.remove(mine.staged)

    async def plug_volume(self, instance_id: str, volume_id: str, path: str, *, readonly: bool, port: int) -> None:
        live = self._living(instance_id)
        await live.vmm.add_disk(volume_disk(self.paths, volume_id, readonly=readonly, port=port))
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_ANSWER)
            await guest.mount_volume(GuestVolume(disk_id=volume_disk_id(volume_id), path=path, readonly=readonly))

    async def unplug_volume(self, instance_id: str, volume_id: str, path: str) -> None:
        """A no-op if the VM has ended or never had the volume. Raises InUse while a process holds it."""
        live = self.live.get(instance_id)
        disk = volume_disk_id(volume_id)
        if live is None or not any(other.id == disk for other in live.vmm.handle.config.disks):
            return
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_ANSWER)
            await guest.unmount_volume(path)
        await live.vmm.remove_disk(disk)

    async def remove_disks(self, instance_id: str) -> None:
        await self.files.remove(self.paths.instance(instance_id).root)

    async def remove_tree(self, path: str) -> None:
        await self.files.remove(Path(path))

    # Logs and outcomes

    async def read_outcome(self, instance_id: str) -> Exited | Fatal | None:
        """How the workload ended, as the guest wrote it to its boot disk, in case the channel was down."""
        record = self.record(instance_id)
        disk = self.paths.instance(instance_id).boot_disk
        try:
            content = await trio.to_thread.run_sync(read_start, disk, MAX_BOOT_DISK)  # the VMM may have enlarged it
        except OSError:
            return None  # it never booted
        return parse_outcome(content, record.nonce)

    def journal(self, instance_id: str, line: str) -> None:
        """Append one line to the instance's ``hypeman`` log; losing one is better than failing for it."""
        text = one_line(line) + "\n"  # parts of it come from guests and images
        with (
            contextlib.suppress(OSError),
            open(open_log(self.paths.instance(instance_id).log("hypeman")), "ab") as file,
        ):
            file.write(text.encode())

    async def rotate_logs(self, instance_id: str, limit: int) -> None:
        """Rotate logs larger than ``limit`` bytes; one old log is kept of each.

        The VMM reopens the console log. It holds its own log open for appending, so that one is copied and
        truncated: a line in flight may be lost, which is harmless for that log.
        """
        mine = self.paths.instance(instance_id)
        live = self.live.get(instance_id)
        app = mine.log("app")
        if live is not None and _size(app) > limit:
            await trio.to_thread.run_sync(os.replace, app, app.with_suffix(".log.1"))
            await live.vmm.rotate_console()
        for log in (mine.log("vmm"), mine.log("hypeman")):
            if _size(log) > limit:
                await self.files.copy(log, log.with_suffix(".log.1"))
                await trio.to_thread.run_sync(_empty, log)

    # The VMM's environment

    async def prepare_run(self, instance_id: str) -> None:
        record = self.record(instance_id)
        uid = self.uid(record)
        mine = self.paths.instance(instance_id)
        await self.files.make_dir(mine.run)
        if not record.nonce:
            raise InternalError(f"instance {instance_id} has no nonce")
        await self.files.write(mine.boot_disk, render_boot_disk(self._boot_config(record)), uid=uid, gid=uid)

    async def remove_run(self, instance_id: str) -> None:
        await self.files.remove(self.paths.instance(instance_id).run)

    async def attach_network(self, instance_id: str) -> None:
        lease = self.lease(instance_id)
        if lease is not None:
            await self.network.attach(lease, uid=self.uid(self.record(instance_id)))

    async def detach_network(self, instance_id: str) -> None:
        lease = self.lease(instance_id)
        if lease is not None:
            await self.network.detach(lease)

    async def plug_in_again(self, instance_id: str) -> None:
        """Reconnect the guest's NIC to its TAP, which was deleted externally and has been recreated."""
        live, lease = self.live.get(instance_id), self.lease(instance_id)
        if live is not None and lease is not None and await self.network.plug_in_again(lease, live.vmm.handle.pid):
            log.warning("instance %s was put on its TAP again, which somebody had deleted", instance_id)

    async def set_egress(self, instance_id: str) -> None:
        lease = self.lease(instance_id)
        if lease is not None:
            await self.egress.enforce(self.record(instance_id), lease)

    async def remove_egress(self, instance_id: str) -> None:
        await self.egress.release(instance_id)

    async def bind_devices(self, instance_id: str) -> None:
        uid = self.uid(self.record(instance_id))
        await self.devices.bind(instance_id, uid=uid, gid=uid)

    async def unbind_devices(self, instance_id: str) -> None:
        await self.devices.unbind(instance_id)

    # VMMs

    async def launch_vmm(self, instance_id: str) -> None:
        record = self.record(instance_id)
        config = vm_config(record, self._surroundings(record), self.paths)
        driver = self.driver(record)
        driver.validate(config)
        with metrics.timed_vmm_call("launch"):
            self._adopt(record, await driver.launch(config))

    async def restore_vmm(self, instance_id: str, capture_id: str, *, keep: bool) -> None:
        record = self.record(instance_id)
        config = vm_config(record, self._surroundings(record), self.paths)
        directory = self.paths.capture(capture_id)
        with metrics.timed_vmm_call("restore"):
            vmm = await self.driver(record).restore(config, directory, keep_capture=keep, paused=True)
        self._adopt(record, vmm)

    def _adopt(self, record: InstanceRecord, vmm: Vmm) -> None:
        live = Live(vmm, nonce=record.nonce, boot=record.boots, connect=self.connect)
        live.give_up(record.id in self._overtaken)
        self.live[record.id] = live

    async def reattach_vmm(self, instance_id: str) -> bool:
        """Reattach to the record's VMM after a server restart; returns whether it is running."""
        record = self.record(instance_id)
        if record.handle is None:
            return False
        try:
            self._adopt(record, await self.driver(record).reattach(record.handle))
        except VmmGone:
            return False
        if self.driver(record).capabilities.balloon:
            await self.live[instance_id].end_loan()  # left by an earlier server
        return True

    async def kill_vmm(self, instance_id: str) -> None:
        """Kill the VMM, including one launched by a server that crashed before recording it."""
        live = self.live.pop(instance_id, None)
        if live is not None:
            await live.vmm.kill()
            await live.vmm.aclose()
        await self.driver(self.record(instance_id)).kill_stray(str(self.paths.instance(instance_id).run))
        self.cgroups.remove(instance_id)

    async def shutdown_guest(self, instance_id: str, grace: float) -> None:
        """Request an orderly shutdown and wait for it; an unresponsive guest is not waited for."""
        live = self.live.get(instance_id)
        if live is None:
            return
        try:
            booting = self.record(instance_id).state in (InstanceState.CREATED, InstanceState.INITIALIZING)
            with live.asking():
                guest = await live.wait_guest(0 if booting else SECONDS_TO_ANSWER)
                with trio.move_on_after(grace + SECONDS_TO_KILL):
                    await guest.shutdown(grace_seconds=grace)
                    await live.vmm.wait_exit()
        except (HypemanError, OSError):
            return  # unresponsive or gone; the VMM is killed next in any case

    async def plug_memory(self, instance_id: str) -> None:
        """Plug all of the guest's assigned memory; the host allocates a page only when it is touched."""
        spec = self.record(instance_id).spec
        live = self._living(instance_id)
        await live.vmm.resize_memory(spec.memory_bytes + spec.hotplug_bytes)
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_ANSWER)
            await guest.online_memory()

    # Captures

    async def save_capture(self, instance_id: str, capture_id: str) -> None:
        live = self._living(instance_id)
        directory = self.paths.capture(capture_id)
        side = directory.with_name(directory.name + ".new")
        await self.files.remove(side)
        await self.files.make_dir(side, mode=0o711)  # a fork's VMM user needs search permission
        async with live.without_loan():
            await self._freeze(live)
            live.hold(True)
            with metrics.timed_vmm_call("capture"):
                await live.vmm.capture(side)
        await self.files.publish(side, directory)

    async def pause(self, instance_id: str) -> None:
        live = self._living(instance_id)
        await self._freeze(live)
        live.hold(True)
        await live.vmm.pause()

    async def _freeze(self, live: Live) -> None:
        with live.asking():
            if live.guest is not None:
                await live.guest.freeze()

    async def discard_capture(self, instance_id: str, capture_id: str) -> None:
        """Resume the VM where it was, with its memory, and remove the capture."""
        directory = self.paths.capture(capture_id)
        await self.files.remove(directory)
        await self.files.remove(directory.with_name(directory.name + ".new"))
        await self.go_on(instance_id)

    async def go_on(self, instance_id: str) -> None:
        live = self.live.get(instance_id)
        if live is None:
            return
        guest = live.guest
        await live.vmm.resume()
        live.hold(False)
        if guest is None:
            return
        try:
            with live.asking():
                try:
                    await guest.thaw()
                except GuestLost:  # the capture closed the channel: the agent reconnects
                    await (await live.wait_guest(LIMITS[Op.THAW], instead_of=guest)).thaw()
        except (VmmGone, VmmBroken):
            raise
        except HypemanError as error:  # the agent thaws its programs after 10 s of guest time
            log.warning("the guest of instance %s did not confirm that it runs on: %s", instance_id, error.message)

    async def awaken_guest(self, instance_id: str, *, fresh: bool) -> None:
        live = self._living(instance_id)
        record = self.record(instance_id)
        await live.vmm.resume()
        lease = self.lease(instance_id)
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_AWAKEN)
            await guest.set_identity(
                hostname=record.name,
                machine_id=machine_id(record.id) if fresh else "",
                network=boot_network(self._guest_network(instance_id)),
                entropy=secrets.token_bytes(64),
                clock_ns=time.time_ns(),
            )
        if lease is not None and lease.enabled:
            await live.vmm.set_link("net0", up=True)
        with live.asking():
            await guest.thaw()

    async def free_capture(self, capture_id: str) -> None:
        """Remove a capture without holders, directory first: a row without one is never restored."""

        def is_free(txn: Txn) -> bool:
            row = txn.get(CAPTURES, capture_id)
            return row is None or not row.holders

        if self.store.read(is_free):
            await self.files.remove(self.paths.capture(capture_id))
            await self.store.write(lambda txn: txn.delete(CAPTURES, capture_id))

    def restorable(self, capture_id: str) -> AbstractAsyncContextManager[None]:
        """Within the block, the capture's memory is uncompressed on disk and not being compressed."""
        return self.compressor.plain(capture_id)

    async def collect_captures(self) -> None:
        """At server start, remove what a crash left: captures without holders and directories without a row."""

        def read(txn: Txn) -> tuple[set[str], list[str]]:
            rows = dict(txn.scan(CAPTURES))
            return set(rows), [key for key, row in rows.items() if not row.holders]

        known, unheld = self.store.read(read)
        if self.paths.captures.is_dir():
            for directory in await trio.to_thread.run_sync(lambda: list(self.paths.captures.iterdir())):
                if directory.name not in known:
                    await _or_log(self.files.remove(directory), directory.name)
        for capture_id in unheld:
            await _or_log(self.free_capture(capture_id), capture_id)

    async def describe_capture(
        self,
        instance_id: str,
        capture_id: str,
        *,
        holder: str,
        compression: SnapshotCompressionConfig | None = None,
    ) -> CaptureRow:
        """The row of a capture just made of the instance."""
        return CaptureRow(
            id=capture_id,
            holders=(holder,),
            size_bytes=await self.files.allocated(self.paths.capture(capture_id)),
            # Some VMMs write plugged memory after the rest, some store all memory in their state file.
            memory_bytes=_size(self.paths.capture(capture_id) / MEMORY) or self.record(instance_id).spec.memory_bytes,
            compression=compression,
        )

    def capture_row(self, capture_id: str) -> CaptureRow:
        row = self.store.read(lambda txn: txn.get(CAPTURES, capture_id))
        if row is None:
            raise CaptureInvalid(f"capture {capture_id} is gone")
        return row

    def capture_is_shared(self, instance_id: str, capture_id: str) -> bool:
        holder = captures.of_instance(instance_id)
        return self.store.read(lambda txn: captures.is_shared(txn, capture_id, holder))

    # Helpers

    def _living(self, instance_id: str) -> Live:
        live = self.live.get(instance_id)
        if live is None:
            raise VmmGone(f"the VM of instance {instance_id} is gone")
        return live

    async def _make_dirs(self, record: InstanceRecord) -> None:
        """Owned by root: a VMM gets descriptors of the files in them and cannot replace the files."""
        mine = self.paths.instance(record.id)
        await self.files.make_dir(mine.root, mode=0o711)
        await self.files.make_dir(mine.logs, mode=0o711)

    def _surroundings(self, record: InstanceRecord) -> Surroundings:
        network = self._guest_network(record.id)
        driver = self.driver(record)
        return Surroundings(
            root_disk=self.images.disk(record.digest),
            kernel=self.kernel,
            initrd=self.initrd,
            cmdline=driver.kernel_cmdline(hotplug_memory=record.spec.hotplug_bytes > 0),
            lease=self.lease(record.id),
            mtu=network.mtu if network is not None else 1500,
            devices=self.devices.sysfs_paths(record.id),
            uid=self.uid(record),
            vsock=driver.capabilities.vsock,
            hotplug=driver.capabilities.hotplug_disk,
            cgroup=self.cgroups.make(
                record.id, vcpus=record.spec.vcpus, memory=record.spec.memory_bytes + record.spec.hotplug_bytes
            ),
        )

    def _guest_network(self, instance_id: str) -> GuestNetwork | None:
        lease = self.lease(instance_id)
        return self.network.guest_network(lease) if lease is not None else None

    def _boot_config(self, record: InstanceRecord) -> BootConfig:
        lease = self.lease(record.id)
        egress_env: Mapping[str, str] = {}
        certificates: tuple[CaCertificate, ...] = ()
        if record.spec.egress and lease is not None:
            egress_env, certificates = self.egress.guest_setup(lease)
        able = self.driver(record).capabilities
        return boot_config(
            record,
            self.images.config(record.digest),
            root_fs=self.images.root_fs(record.digest),
            disks=vm_disks(record, self.images.disk(record.digest), self.paths, hotplug=able.hotplug_disk),
            network=self._guest_network(record.id),
            egress_env=egress_env,
            certificates=certificates,
            able=able,
            clock_ns=time.time_ns(),
        )


async def _or_log(removal: Awaitable[None], capture: str) -> None:
    """Leftovers only cost disk space; the next server start retries."""
    try:
        await removal
    except Exception as error:
        log.warning("capture %s, which nobody needs, can not be removed: %s", capture, error)


def _empty(path: Path) -> None:
    """Truncate one of the server's logs. Raises OSError; EINVAL if it is not a regular file."""
    descriptor = open_log(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
