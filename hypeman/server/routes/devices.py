"""PCI devices for passthrough (§2.8)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from hypeman.devices.types import AvailableDevice, CreateDeviceRequest, Device
from hypeman.server.api import Routes
from hypeman.server.routes.queries import TagQuery
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("devices")


class AvailableQuery(Struct, frozen=True, kw_only=True):
    all: Annotated[bool, Meta(description="Also those that cannot be passed through, with the reason")] = False


@routes.get("/devices", Scope.DEVICE_READ)
async def list_devices(services: Services, query: TagQuery) -> list[Device]:
    """All registered devices."""
    return list(services.devices.list(query.tags))


@routes.post("/devices", Scope.DEVICE_WRITE, status=201, fails=(400, 404, 409))
async def register_device(services: Services, body: CreateDeviceRequest) -> Device:
    """Register a PCI function for use by instances."""
    return await services.devices.register(body)


@routes.get("/devices/available", Scope.DEVICE_READ)
async def list_available_devices(services: Services, query: AvailableQuery) -> list[AvailableDevice]:
    """PCI functions of this host that could be passed through."""
    return list(await services.devices.available(everything=query.all))


@routes.get("/devices/{id}", Scope.DEVICE_READ, fails=(404, 409))
async def get_device(services: Services, id: str) -> Device:
    """One device, by id or name."""
    return services.devices.get(id)


@routes.delete("/devices/{id}", Scope.DEVICE_DELETE, fails=(404, 409))
async def delete_device(services: Services, id: str) -> None:
    """Unregister a device and give it back to its driver."""
    await services.devices.delete(id)
