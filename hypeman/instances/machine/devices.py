"""Effects on devices that are passed through to an instance."""

from __future__ import annotations

from typing import Protocol

from hypeman.instances.machine.context import Context
from hypeman.instances.model.steps import BindDevices


class DeviceNeeds(Protocol):
    async def bind(self, instance_id: str, *, uid: int = 0, gid: int = 0) -> None: ...
    async def unbind(self, instance_id: str) -> None: ...
    def sysfs_paths(self, instance_id: str) -> tuple[str, ...]: ...


class Devices:
    def __init__(self, context: Context, devices: DeviceNeeds) -> None:
        self._context = context
        self._devices = devices

    async def bind(self, step: BindDevices) -> None:
        uid = self._context.uid(self._context.record(step.instance))
        await self._devices.bind(step.instance, uid=uid, gid=uid)

    async def unbind(self, step: BindDevices) -> None:
        await self._devices.unbind(step.instance)

    def sysfs_paths(self, instance_id: str) -> tuple[str, ...]:
        return self._devices.sysfs_paths(instance_id)
