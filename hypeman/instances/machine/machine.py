"""The machine: all effects of instances on the host, and the running VMs. Built once per server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from hypeman.captures.records import CaptureRow
from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.config import Config
from hypeman.guest.types import Exited, Fatal
from hypeman.host.cgroups import CGroups
from hypeman.host.files import Files
from hypeman.hypervisor.interface import Capabilities, Driver
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.machine.captures import Captures, CompressorNeeds
from hypeman.instances.machine.context import Context
from hypeman.instances.machine.devices import DeviceNeeds, Devices
from hypeman.instances.machine.disks import Disks, TemplateNeeds
from hypeman.instances.machine.effects import Effects
from hypeman.instances.machine.guest import Guests
from hypeman.instances.machine.live import Connect, Live, connect_guest
from hypeman.instances.machine.logs import Logs
from hypeman.instances.machine.network import EgressNeeds, Network, NetworkNeeds
from hypeman.instances.machine.vmm import ImageNeeds, Vmms
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.steps import Reversible, ShutdownGuest, Step
from hypeman.paths import Paths
from hypeman.store import Store


class Machine:
    """Implements ``Machine`` of ../life/machine.py; its parts are for the service."""

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
        self.boot_id = boot_id
        """The host's boot id; a VMM's handle has the one it was started in."""
        self.context = context = Context(
            store=store,
            paths=config.paths,
            files=files,
            drivers=drivers,
            uid_base=config.hypervisor.uid_base,
        )
        self.network = Network(context, network, egress)
        self.guests = Guests(context, self.network)
        self.captures = Captures(context, self.guests, compressor)
        self.logs = Logs(context)
        bound = Devices(context, devices)
        vmms = Vmms(
            context,
            network=self.network,
            devices=bound,
            logs=self.logs,
            images=images,
            cgroups=cgroups,
            kernel=kernel,
            initrd=initrd,
            connect=connect,
        )
        self._vmms = vmms
        self._effects = Effects(
            disks=Disks(context, templates),
            network=self.network,
            devices=bound,
            vmms=vmms,
            guests=self.guests,
            captures=self.captures,
        )

    @property
    def paths(self) -> Paths:
        return self.context.paths

    def on_vmm_end(self, react: Callable[[InstanceRecord], object]) -> None:
        """Call ``react`` before a VMM ends and after it, while its control group and TAP are still there."""
        self._vmms.on_end = react

    async def do(self, step: Step) -> None:
        if isinstance(step, ShutdownGuest):
            self._vmms.count(step.instance)
        await self._effects.do(step)

    async def undo(self, step: Reversible) -> None:
        await self._effects.undo(step)

    async def introduce(self, record: InstanceRecord) -> None:
        """Tell the guest of a pool's member that it is ``record``."""
        await self.guests.introduce(record)

    def live(self, instance_id: str) -> Live | None:
        return self.context.live.get(instance_id)

    def unwatch(self, instance_id: str) -> None:
        self.context.live.pop(instance_id, None)

    async def reattach(self, instance_id: str) -> bool:
        return await self._vmms.reattach(instance_id)

    def give_up_guest(self, instance_id: str, given_up: bool) -> None:
        self.context.give_up_guest(instance_id, given_up)

    async def end_vmm(self, instance_id: str) -> None:
        await self._vmms.end(instance_id)

    def capabilities(self, record: InstanceRecord) -> Capabilities:
        return self.context.driver(record).capabilities

    async def plug_memory(self, instance_id: str) -> None:
        await self.guests.plug_memory(instance_id)

    async def read_outcome(self, instance_id: str) -> Exited | Fatal | None:
        return await self.logs.read_outcome(instance_id)

    def journal(self, instance_id: str, line: str) -> None:
        self.logs.journal(instance_id, line)

    def restorable(self, capture_id: str) -> AbstractAsyncContextManager[None]:
        return self.captures.restorable(capture_id)

    async def describe_capture(
        self,
        instance_id: str,
        capture_id: str,
        *,
        holder: str,
        compression: SnapshotCompressionConfig | None = None,
    ) -> CaptureRow:
        return await self.captures.describe(instance_id, capture_id, holder=holder, compression=compression)
