"""Effects inside a running guest, with the VM around it: freeze and pause, awaken, shut down, hotplug."""

from __future__ import annotations

import logging
import secrets
import time

import trio

from hypeman.errors import HypemanError, InvalidState
from hypeman.guest.boot import GuestVolume
from hypeman.guest.client import GuestClient
from hypeman.guest.failures import GuestLost
from hypeman.guest.limits import LIMITS
from hypeman.guest.protocol import Op
from hypeman.hypervisor.interface import VmmBroken, VmmGone
from hypeman.instances.machine.context import Context
from hypeman.instances.machine.live import Live
from hypeman.instances.machine.network import Network
from hypeman.instances.model.guest_boot import boot_network, hostname, machine_id
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.steps import AwakenGuest, GoOn, PauseVm, PlugVolume, ShutdownGuest, WarmGuest
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.vm import volume_disk, volume_disk_id

log = logging.getLogger(__name__)

SECONDS_TO_AWAKEN = 60.0
"""A restored guest answers in 0.1 s; the limit allows for a host that swaps."""
SECONDS_TO_WARM = 8.0
"""A guest thaws its program by itself 10 s after it was frozen."""
SECONDS_TO_ANSWER = 5.0
"""For a running guest whose channel is being opened, for example after a server restart."""
SECONDS_TO_END = 1.0
"""For a VMM that has closed its connections, as the kernel does for one that ends."""
SECONDS_TO_KILL = 5.0
"""After the guest was asked to power off and its grace period is over."""


async def freeze(live: Live) -> None:
    """Freeze the workload, if the agent is connected."""
    with live.asking():
        if live.guest is not None:
            await live.guest.freeze()


class Guests:
    def __init__(self, context: Context, network: Network) -> None:
        self._context = context
        self._network = network

    async def pause(self, step: PauseVm) -> None:
        live = self._context.living(step.instance)
        await freeze(live)
        live.hold(True)
        await live.vmm.pause()

    async def go_on(self, step: PauseVm | GoOn) -> None:
        await self.resume(step.instance)

    async def resume(self, instance_id: str) -> None:
        """Resume the VM and thaw its workload; a no-op if the VM is gone or runs."""
        live = self._context.live.get(instance_id)
        if live is None:
            return
        try:
            await self._resume(instance_id, live)
        except VmmGone:
            with trio.move_on_after(SECONDS_TO_END):
                await live.vmm.wait_exit()
                return
            raise  # only its connection is gone: the VM may still be paused

    async def _resume(self, instance_id: str, live: Live) -> None:
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

    async def warm(self, step: WarmGuest) -> None:
        """Raises InvalidState if the guest took so long that its program may have been thawed."""
        live = self._context.living(step.instance)
        try:
            with trio.fail_after(SECONDS_TO_WARM):
                await live.vmm.resume()
                guest = await self._identify(self._context.record(step.instance), live, fresh=True)
                await guest.warm()
                await guest.freeze()  # again, since the limit of the capture's runs on
                live.hold(True)
                await live.vmm.pause()
        except trio.TooSlowError:
            raise InvalidState(f"the guest was not ready within {SECONDS_TO_WARM:g} s") from None

    async def leave_warm(self, step: WarmGuest) -> None:
        """Nothing: the undo of its restore ends its VMM."""

    async def introduce(self, record: InstanceRecord) -> None:
        """Resume a warm guest, which is to be ``record``, and tell it its name; its program stays frozen."""
        live = self._context.living(record.id)
        await live.vmm.resume()
        await self._identify(record, live, fresh=False)
        live.known_as = hostname(record)

    async def _identify(self, record: InstanceRecord, live: Live, *, fresh: bool) -> GuestClient:
        """Tell the guest who it is; ``fresh``: also a new machine-id. Raises InvalidState, VmmGone, GuestLost …"""
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_AWAKEN)
            await guest.set_identity(
                hostname=hostname(record),
                machine_id=machine_id(record.id) if fresh else "",
                network=boot_network(self._network.of_guest(record.id)),
                entropy=secrets.token_bytes(64),
                clock_ns=time.time_ns(),
            )
        return guest

    async def awaken(self, step: AwakenGuest) -> None:
        live = self._context.living(step.instance)
        record = self._context.record(step.instance)
        if live.known_as != hostname(record):
            await live.vmm.resume()
            await self._identify(record, live, fresh=step.fresh)
        lease = self._context.lease(step.instance)
        if lease is not None and lease.enabled:
            await live.vmm.set_link("net0", up=True)
            await self._network.release(step)  # before its program runs: the packets that woke it come first
        with live.asking():
            await (await live.wait_guest(LIMITS[Op.THAW])).thaw()
        live.hold(False)
        live.known_as = None

    async def shutdown(self, step: ShutdownGuest) -> None:
        """Request an orderly shutdown and wait for it; an unresponsive guest is not waited for."""
        live = self._context.live.get(step.instance)
        if live is None:
            return
        try:
            state = self._context.record(step.instance).state
            booting = state in (InstanceState.CREATED, InstanceState.INITIALIZING)
            with live.asking():
                guest = await live.wait_guest(0 if booting else SECONDS_TO_ANSWER)
                with trio.move_on_after(step.grace + SECONDS_TO_KILL):
                    await guest.shutdown(grace_seconds=step.grace)
                    await live.vmm.wait_exit()
        except (HypemanError, OSError):
            return  # unresponsive or gone; the VMM is killed next in any case

    async def plug_volume(self, step: PlugVolume) -> None:
        live = self._context.living(step.instance)
        paths, disk_id = self._context.paths, volume_disk_id(step.volume)
        with live.asking():  # a disk that was plugged in cannot be removed from a guest that does not answer
            await (await live.wait_guest(SECONDS_TO_ANSWER)).ping()
        await live.vmm.add_disk(volume_disk(paths, step.volume, readonly=step.readonly, port=step.port))
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_ANSWER)
            await guest.mount_volume(GuestVolume(disk_id=disk_id, path=step.path, readonly=step.readonly))

    async def unplug_volume(self, step: PlugVolume) -> None:
        """A no-op if the VM has ended or never had the volume. Raises InUse while a process holds it."""
        live = self._context.live.get(step.instance)
        disk = volume_disk_id(step.volume)
        if live is None or not any(other.id == disk for other in live.vmm.handle.config.disks):
            return
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_ANSWER)
            await guest.unmount_volume(step.path)
        await live.vmm.remove_disk(disk)

    async def plug_memory(self, instance_id: str) -> None:
        """Plug all of the guest's assigned memory; the host allocates a page only when it is touched."""
        spec = self._context.record(instance_id).spec
        live = self._context.living(instance_id)
        await live.vmm.resize_memory(spec.memory_bytes + spec.hotplug_bytes)
        with live.asking():
            guest = await live.wait_guest(SECONDS_TO_ANSWER)
            await guest.online_memory()
