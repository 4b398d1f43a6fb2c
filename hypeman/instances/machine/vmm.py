"""Effects on VMMs: the runtime directory and boot disk, launch, restore, reattach and kill."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hypeman.errors import HypemanError, InternalError
from hypeman.guest.boot import BootConfig, render_boot_disk
from hypeman.host.cgroups import CGroups
from hypeman.hypervisor.interface import Vmm, VmmGone
from hypeman.images.types import ImageConfig
from hypeman.instances.machine.context import Context
from hypeman.instances.machine.devices import Devices
from hypeman.instances.machine.live import Connect, Live
from hypeman.instances.machine.logs import Logs
from hypeman.instances.machine.network import Network
from hypeman.instances.model.guest_boot import boot_config
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.steps import LaunchVmm, PrepareRun, RestoreVmm
from hypeman.instances.model.vm import Environment, vm_config, vm_disks
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)


class ImageNeeds(Protocol):
    def disk(self, digest: str) -> Path: ...
    def root_fs(self, digest: str) -> str: ...
    def config(self, digest: str) -> ImageConfig: ...


class Vmms:
    def __init__(
        self,
        context: Context,
        *,
        network: Network,
        devices: Devices,
        logs: Logs,
        images: ImageNeeds,
        cgroups: CGroups,
        kernel: str,
        initrd: str | None,
        connect: Connect,
    ) -> None:
        self._context = context
        self._network = network
        self._devices = devices
        self._logs = logs
        self._images = images
        self._cgroups = cgroups
        self._kernel = kernel
        self._initrd = initrd
        self._connect = connect
        self.on_end: Callable[[InstanceRecord], object] = lambda record: None
        """Called before a VMM ends and after it, while its control group and TAP are still there."""

    async def prepare_run(self, step: PrepareRun) -> None:
        record = self._context.record(step.instance)
        uid = self._context.uid(record)
        mine = self._context.paths.instance(step.instance)
        await self._context.files.make_dir(mine.run)
        if not record.nonce:
            raise InternalError(f"instance {step.instance} has no nonce")
        content = render_boot_disk(self._boot_config(record))
        await self._context.files.write(mine.boot_disk, content, uid=uid, gid=uid)

    async def remove_run(self, step: PrepareRun) -> None:
        await self._context.files.remove(self._context.paths.instance(step.instance).run)

    async def launch(self, step: LaunchVmm) -> None:
        record = self._context.record(step.instance)
        config = vm_config(record, self._environment(record), self._context.paths)
        driver = self._context.driver(record)
        driver.validate(config)
        await self._logs.begin_run(step.instance)
        with metrics.timed_vmm_call("launch"):
            self._watch(record, await driver.launch(config))

    async def restore(self, step: RestoreVmm) -> None:
        record = self._context.record(step.instance)
        config = vm_config(record, self._environment(record), self._context.paths)
        directory = self._context.paths.capture(step.capture)
        driver = self._context.driver(record)
        with metrics.timed_vmm_call("restore"):
            vmm = await driver.restore(config, directory, keep_capture=step.keep, paused=True)
            self._watch(record, vmm, restored=True)

    async def reattach(self, instance_id: str) -> bool:
        """Reattach to the record's VMM after a server restart; returns whether it is running."""
        record = self._context.record(instance_id)
        if record.handle is None:
            return False
        driver = self._context.driver(record)
        try:
            self._watch(record, await driver.reattach(record.handle))
        except VmmGone:
            return False
        if driver.capabilities.balloon:
            await self._context.live[instance_id].end_loan()  # left by an earlier server
        return True

    async def kill(self, step: LaunchVmm | RestoreVmm) -> None:
        """Kill the VMM, including one launched by a server that crashed before recording it."""
        live = self._context.live.pop(step.instance, None)
        self.count(step.instance)
        if live is not None:
            await live.vmm.kill()  # has ended when this returns; there is no other one of this run directory
            await live.vmm.aclose()
        else:
            driver = self._context.driver(self._context.record(step.instance))
            await driver.kill_stray(str(self._context.paths.instance(step.instance).run))
        self.count(step.instance)
        self._cgroups.remove(step.instance)

    def count(self, instance_id: str) -> None:
        """Record the VMM's usage while it can be read. Without control groups, that requires a live process."""
        try:
            self.on_end(self._context.record(instance_id))
        except HypemanError as error:  # it must not keep a VM from ending
            log.warning("the usage of instance %s could not be read: %s", instance_id, error.message)

    async def end(self, instance_id: str) -> None:
        """Kill the VMM, which may be just being restored, but leave the rest to the command that waits for it."""
        live = self._context.live.get(instance_id)
        if live is not None:
            await live.vmm.kill()
        else:
            driver = self._context.driver(self._context.record(instance_id))
            await driver.kill_stray(str(self._context.paths.instance(instance_id).run))

    def _watch(self, record: InstanceRecord, vmm: Vmm, *, restored: bool = False) -> None:
        live = Live(vmm, nonce=record.nonce, boot=record.boots, connect=self._connect, restored=restored)
        self._context.watch(record.id, live)

    def _environment(self, record: InstanceRecord) -> Environment:
        network = self._network.of_guest(record.id)
        driver = self._context.driver(record)
        return Environment(
            root_disk=self._images.disk(record.digest),
            kernel=self._kernel,
            initrd=self._initrd,
            cmdline=driver.kernel_cmdline(hotplug_memory=record.spec.hotplug_bytes > 0),
            lease=self._context.lease(record.id),
            mtu=network.mtu if network is not None else 1500,
            devices=self._devices.sysfs_paths(record.id),
            uid=self._context.uid(record),
            vsock=driver.capabilities.vsock,
            hotplug=driver.capabilities.hotplug_disk,
            cgroup=self._cgroups.make(
                record.id, vcpus=record.spec.vcpus, memory=record.spec.memory_bytes + record.spec.hotplug_bytes
            ),
        )

    def _boot_config(self, record: InstanceRecord) -> BootConfig:
        egress_env, certificates = self._network.egress_setup(record)
        able = self._context.driver(record).capabilities
        root_disk = self._images.disk(record.digest)
        return boot_config(
            record,
            self._images.config(record.digest),
            root_fs=self._images.root_fs(record.digest),
            disks=vm_disks(record, root_disk, self._context.paths, hotplug=able.hotplug_disk),
            network=self._network.of_guest(record.id),
            egress_env=egress_env,
            certificates=certificates,
            able=able,
            clock_ns=time.time_ns(),
        )
