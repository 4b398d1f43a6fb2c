"""Auto-standby and snapshot schedules of instances (§2.3)."""

from __future__ import annotations

from hypeman.instances.model.snapshot_types import SetSnapshotScheduleRequest, SnapshotSchedule
from hypeman.instances.model.types import AutoStandbyStatus
from hypeman.server.api import Routes
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("policies")


@routes.get("/instances/{id}/auto-standby/status", Scope.INSTANCE_READ, fails=(404, 409))
async def get_auto_standby_status(services: Services, id: str) -> AutoStandbyStatus:
    """Whether an instance is about to enter standby by itself, and why or why not."""
    return await services.policies.standby_status(id)


@routes.post("/instances/{id}/auto-standby/hold", Scope.INSTANCE_WRITE, fails=(404, 409))
async def hold_auto_standby(services: Services, id: str) -> AutoStandbyStatus:
    """Keep an instance from entering standby by itself for one idle timeout from now."""
    return await services.policies.hold(id)


@routes.get("/instances/{id}/snapshot-schedule", Scope.SNAPSHOT_READ, fails=(404, 409))
async def get_snapshot_schedule(services: Services, id: str) -> SnapshotSchedule:
    """The snapshot schedule of an instance."""
    return await services.policies.get_schedule(id)


@routes.put("/instances/{id}/snapshot-schedule", Scope.SNAPSHOT_WRITE, fails=(400, 404, 409))
async def set_snapshot_schedule(services: Services, id: str, body: SetSnapshotScheduleRequest) -> SnapshotSchedule:
    """Have snapshots of an instance made regularly.

    Retention is applied after each successful run, to the snapshots that this schedule made and to no others; the
    newest of them is always kept.
    """
    return await services.policies.set_schedule(id, body)


@routes.delete("/instances/{id}/snapshot-schedule", Scope.SNAPSHOT_DELETE, fails=(404, 409))
async def delete_snapshot_schedule(services: Services, id: str) -> None:
    """Delete the snapshot schedule of an instance.

    The snapshots that it made stay.
    """
    await services.policies.delete_schedule(id)
