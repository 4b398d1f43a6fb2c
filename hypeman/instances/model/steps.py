"""The steps that plans consist of: plain data with ``do`` next to ``undo``.

A step holds names, not objects: it is stored before it runs, read back after a crash, and acts on
the World passed to it. The guarantees of every step are in ``saga/runner.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from hypeman.instances.machine.world import World


class _Step(msgspec.Struct, frozen=True, tag=True):
    """Base: a step on one instance, stored with its class name."""

    instance: str


class MakeDisks(_Step, frozen=True):
    """The instance's directory, its writable layer, and the write layers of its volumes."""

    async def do(self, world: World) -> None:
        await world.make_disks(self.instance)

    async def undo(self, world: World) -> None:
        await world.remove_disks(self.instance)


class CopyDisks(_Step, frozen=True):
    """Like MakeDisks, as a copy of another instance's or a snapshot's disks (``source`` is a directory)."""

    source: str

    async def do(self, world: World) -> None:
        await world.copy_disks(self.instance, self.source)

    async def undo(self, world: World) -> None:
        await world.remove_disks(self.instance)


class TakeDisks(_Step, frozen=True):
    """Like MakeDisks, moved from directory ``source``, which belongs to this plan alone."""

    source: str

    async def do(self, world: World) -> None:
        await world.take_disks(self.instance, self.source)

    async def undo(self, world: World) -> None:
        await world.remove_disks(self.instance)
        await world.remove_tree(self.source)


class PrepareRun(_Step, frozen=True):
    """The runtime directory and the disk that tells the guest how to boot."""

    async def do(self, world: World) -> None:
        await world.prepare_run(self.instance)

    async def undo(self, world: World) -> None:
        await world.remove_run(self.instance)


class AttachNetwork(_Step, frozen=True):
    """TAP, route, rules and limits for the instance's lease; blocked until all are in place."""

    async def do(self, world: World) -> None:
        await world.attach_network(self.instance)

    async def undo(self, world: World) -> None:
        await world.detach_network(self.instance)


class SetEgress(_Step, frozen=True):
    """The policy of the egress proxy for the instance's address."""

    async def do(self, world: World) -> None:
        await world.set_egress(self.instance)

    async def undo(self, world: World) -> None:
        await world.remove_egress(self.instance)


class BindDevices(_Step, frozen=True):
    """VFIO drivers on the instance's devices, and its mediated device."""

    async def do(self, world: World) -> None:
        await world.bind_devices(self.instance)

    async def undo(self, world: World) -> None:
        await world.unbind_devices(self.instance)


class LaunchVmm(_Step, frozen=True):
    """A VMM that boots the guest."""

    async def do(self, world: World) -> None:
        await world.launch_vmm(self.instance)

    async def undo(self, world: World) -> None:
        await world.kill_vmm(self.instance)


class RestoreVmm(_Step, frozen=True):
    """A VMM with the captured guest, paused and with its link down: nothing has run yet."""

    capture: str
    keep: bool

    async def do(self, world: World) -> None:
        await world.restore_vmm(self.instance, self.capture, keep=self.keep)

    async def undo(self, world: World) -> None:
        await world.kill_vmm(self.instance)


class AwakenGuest(_Step, frozen=True):
    """The restored guest gets its clock, entropy and identity, and only then its network and program.

    No undo: from here on the guest has run, and its capture, if consumed, no longer matches it.
    """

    fresh: bool
    """A fork also gets a new machine-id, and the source's connections are closed."""

    async def do(self, world: World) -> None:
        await world.awaken_guest(self.instance, fresh=self.fresh)

    async def undo(self, world: World) -> None:
        raise AssertionError("awakening is never taken back")


class SaveCapture(_Step, frozen=True):
    """Freeze the workload, pause the VM and publish its capture. Undo: resume the VM."""

    capture: str

    async def do(self, world: World) -> None:
        await world.save_capture(self.instance, self.capture)

    async def undo(self, world: World) -> None:
        await world.discard_capture(self.instance, self.capture)


class CopyDisksAway(_Step, frozen=True):
    """Copy the instance's writable layers into directory ``target``, while nothing writes."""

    target: str

    async def do(self, world: World) -> None:
        await world.copy_disks_away(self.instance, self.target)

    async def undo(self, world: World) -> None:
        await world.remove_tree(self.target)


class PlugVolume(_Step, frozen=True):
    """Plug a volume's disk into the running VM and have the guest mount it."""

    volume: str
    path: str
    readonly: bool
    port: int

    async def do(self, world: World) -> None:
        await world.plug_volume(self.instance, self.volume, self.path, readonly=self.readonly, port=self.port)

    async def undo(self, world: World) -> None:
        await world.unplug_volume(self.instance, self.volume, self.path)


class StageDisks(_Step, frozen=True):
    """Copy the disks of a snapshot next to the instance's own, to replace them by rename."""

    source: str

    async def do(self, world: World) -> None:
        await world.stage_disks(self.instance, self.source)

    async def undo(self, world: World) -> None:
        await world.unstage_disks(self.instance)


class PauseVm(_Step, frozen=True):
    """Freeze the workload and pause the VM: nothing writes until it is resumed. Undo: resume it."""

    async def do(self, world: World) -> None:
        await world.pause(self.instance)

    async def undo(self, world: World) -> None:
        await world.go_on(self.instance)


class GoOn(_Step, frozen=True):
    """Resume the VM after its capture, as if nothing had happened."""

    async def do(self, world: World) -> None:
        await world.go_on(self.instance)

    async def undo(self, world: World) -> None:
        await world.go_on(self.instance)


class ShutdownGuest(_Step, frozen=True):
    """Ask the guest to end its workload and power off; wait up to ``grace`` seconds."""

    grace: float

    async def do(self, world: World) -> None:
        await world.shutdown_guest(self.instance, self.grace)

    async def undo(self, world: World) -> None:
        raise AssertionError("a shutdown is never taken back")


class SwapDisks(_Step, frozen=True):
    """Replace the instance's disks with the staged ones."""

    async def do(self, world: World) -> None:
        await world.swap_disks(self.instance)

    async def undo(self, world: World) -> None:
        raise AssertionError("what was replaced is gone")


class FreeCapture(msgspec.Struct, frozen=True, tag=True):
    """Remove a capture if it has no holders."""

    capture: str

    async def do(self, world: World) -> None:
        await world.free_capture(self.capture)

    async def undo(self, world: World) -> None:
        raise AssertionError("a freed capture does not come back")


Reversible = (
    MakeDisks
    | CopyDisks
    | TakeDisks
    | PrepareRun
    | AttachNetwork
    | SetEgress
    | BindDevices
    | LaunchVmm
    | RestoreVmm
    | SaveCapture
    | CopyDisksAway
    | PauseVm
    | GoOn
    | PlugVolume
    | StageDisks
)


class TakeBack(msgspec.Struct, frozen=True, tag=True):
    """The undo of a step as a step: a stop tears down what a start set up."""

    step: Reversible

    async def do(self, world: World) -> None:
        await self.step.undo(world)

    async def undo(self, world: World) -> None:
        raise AssertionError("taking down goes forward only")


Step = Reversible | AwakenGuest | ShutdownGuest | SwapDisks | FreeCapture | TakeBack
