"""Which effect each step has, and for Reversible ones the effect that undoes it: ``{StepType: (do, undo)}``.

Every effect is idempotent and a no-op if there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import trio

from hypeman.instances.machine.captures import Captures
from hypeman.instances.machine.devices import Devices
from hypeman.instances.machine.disks import Disks
from hypeman.instances.machine.guest import Guests
from hypeman.instances.machine.network import Network
from hypeman.instances.machine.vmm import Vmms
from hypeman.instances.model import steps
from hypeman.instances.model.steps import Irreversible, Reversible, Step, TakeBack, Together
from hypeman.telemetry import traces

Effect: TypeAlias = Callable[[Any], Awaitable[None]]
R = TypeVar("R", bound=Reversible)
I = TypeVar("I", bound=Irreversible)  # noqa: E741


class Effects:
    """Does and undoes steps (``saga/runner.py``)."""

    def __init__(
        self, *, disks: Disks, network: Network, devices: Devices, vmms: Vmms, guests: Guests, captures: Captures
    ) -> None:
        self.reversible: dict[type[object], tuple[Effect, Effect]] = dict(
            (
                _pair(steps.MakeDisks, disks.make, disks.remove),
                _pair(steps.CopyDisks, disks.copy, disks.remove),
                _pair(steps.TakeDisks, disks.take, disks.remove_with_source),
                _pair(steps.PrepareRun, vmms.prepare_run, vmms.remove_run),
                _pair(steps.AttachNetwork, network.attach, network.detach),
                _pair(steps.SetEgress, network.set_egress, network.remove_egress),
                _pair(steps.BindDevices, devices.bind, devices.unbind),
                _pair(steps.LaunchVmm, vmms.launch, vmms.kill),
                _pair(steps.RestoreVmm, vmms.restore, vmms.kill),
                _pair(steps.WarmGuest, guests.warm, guests.leave_warm),
                _pair(steps.HoldTraffic, network.hold, network.release),
                _pair(steps.SaveCapture, captures.save, captures.discard),
                _pair(steps.CopyDisksAway, disks.copy_away, disks.remove_copy),
                _pair(steps.PauseVm, guests.pause, guests.go_on),
                _pair(steps.GoOn, guests.go_on, guests.go_on),
                _pair(steps.PlugVolume, guests.plug_volume, guests.unplug_volume),
                _pair(steps.StageDisks, disks.stage, disks.unstage),
            )
        )
        self.irreversible: dict[type[object], Effect] = dict(
            (
                _single(steps.AwakenGuest, guests.awaken),
                _single(steps.ShutdownGuest, guests.shutdown),
                _single(steps.SwapDisks, disks.swap),
                _single(steps.FreeCapture, captures.free),
                _single(steps.TakeBack, self._take_back),
                _single(steps.Together, self._together),
            )
        )

    async def do(self, step: Step) -> None:
        with traces.span(type(step).__name__):
            if isinstance(step, Reversible):
                await self.reversible[type(step)][0](step)
            else:
                await self.irreversible[type(step)](step)

    async def undo(self, step: Reversible) -> None:
        with traces.span(f"undo {type(step).__name__}"):
            await self.reversible[type(step)][1](step)

    async def _take_back(self, step: TakeBack) -> None:
        await self.undo(step.step)

    async def _together(self, step: Together) -> None:
        """Raises the first error once all are done."""
        errors: list[Exception] = []

        async def one(undo: TakeBack) -> None:
            try:
                await self._take_back(undo)
            except Exception as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for each in step.steps:
                nursery.start_soon(one, each)
        if errors:
            raise errors[0]


def _pair(
    step: type[R], do: Callable[[R], Awaitable[None]], undo: Callable[[R], Awaitable[None]]
) -> tuple[type[object], tuple[Effect, Effect]]:
    """An entry whose effects take this type of step, which a dict's type cannot say."""
    return step, (do, undo)


def _single(step: type[I], do: Callable[[I], Awaitable[None]]) -> tuple[type[object], Effect]:
    return step, do
