"""Virtual machines and their life cycle (§2.3). ``{id}`` is an id, a name, or an id prefix."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

from msgspec import Meta, Struct

from hypeman.errors import InvalidRequest, NotFound
from hypeman.fields import Count, Duration, TagMap
from hypeman.guest.types import PathInfo
from hypeman.instances.model.snapshot_types import CreateSnapshotRequest, RestoreSnapshotRequest, Snapshot
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    CreateInstanceRequest,
    ForkInstanceRequest,
    Instance,
    InstanceState,
    InstanceStats,
    LogRun,
    LogSource,
    StandbyInstanceRequest,
    StartInstanceRequest,
    StopInstanceRequest,
    UpdateInstanceRequest,
    UsageOfAll,
    WaitForStateResponse,
)
from hypeman.server.api import SSE_HEADERS, EventStream, Routes
from hypeman.server.follow import Lines, LogStream, UsedStream
from hypeman.server.moments import parse_moment
from hypeman.server.services import Services
from hypeman.tokens import Scope
from hypeman.units import parse_duration

routes = Routes("instances")

_LONGEST_WAIT = 300.0


class InstanceQuery(Struct, frozen=True, kw_only=True):
    state: InstanceState | None = None
    tags: TagMap = {}


class LogQuery(Struct, frozen=True, kw_only=True):
    tail: Annotated[Count, Meta(description="Lines from before")] = 100
    follow: bool = False
    source: LogSource = LogSource.APP
    positions: Annotated[
        bool, Meta(description="Extension. Each event has an id: where its line ends; one comes first")
    ] = False
    after: Annotated[
        str, Meta(description="Extension. The id of an event: continue with the line after it, and with ids; no tail")
    ] = ""
    since: Annotated[
        str,
        Meta(
            description="Extension. Only lines written then or later, exact to about a second: a duration before "
            "now, or an RFC 3339 time",
            examples=["10m", "2026-01-02T03:04:05Z"],
        ),
    ] = ""
    run: Annotated[
        LogRun | None, Meta(description="Extension. Only what the program printed in this run; default: all runs")
    ] = None
    times: Annotated[
        bool, Meta(description="Extension. Before each event a comment `: time=` has when its line was written")
    ] = False


class StatQuery(Struct, frozen=True, kw_only=True):
    path: str
    follow_links: bool = False


class DeleteQuery(Struct, frozen=True, kw_only=True):
    graceful_shutdown: Annotated[
        bool, Meta(description="Ask the guest to shut down first; false: kill its VM at once")
    ] = True


class WaitQuery(Struct, frozen=True, kw_only=True):
    state: Annotated[InstanceState, Meta(extra_json_schema={"not": {"const": InstanceState.UNKNOWN.value}})]
    timeout: Annotated[Duration, Meta(description="At most 5m")] = "60s"


@routes.get("/instances", Scope.INSTANCE_READ)
async def list_instances(services: Services, query: InstanceQuery) -> list[Instance]:
    """All matching instances."""
    # Bytes are the encoded list; the server sends them unchanged.
    return await services.instances.list(query.state, query.tags)  # type: ignore[return-value]


@routes.post("/instances", Scope.INSTANCE_WRITE, status=201, fails=(400, 404, 409, 429, 501, 502), measure="create")
async def create_instance(services: Services, body: CreateInstanceRequest) -> Instance:
    """Make an instance and boot it.

    A missing image is pulled first.
    """
    return await services.instances.create(body)


@routes.get("/instances/{id}", Scope.INSTANCE_READ, fails=(404, 409))
async def get_instance(services: Services, id: str) -> Instance:
    """One instance."""
    return await services.instances.get_encoded(id)  # type: ignore[return-value]  # bytes, as above


@routes.patch("/instances/{id}", Scope.INSTANCE_WRITE, fails=(400, 404, 409, 501))
async def update_instance(services: Services, id: str, body: UpdateInstanceRequest) -> Instance:
    """Change what may change without a reboot."""
    return await services.instances.update(id, body)


@routes.delete("/instances/{id}", Scope.INSTANCE_DELETE, fails=(400, 404, 409))
async def delete_instance(services: Services, id: str, query: DeleteQuery) -> None:
    """Stop an instance and remove everything that belongs to it."""
    await services.instances.delete(id, graceful=query.graceful_shutdown)


@routes.post("/instances/{id}/start", Scope.INSTANCE_WRITE, fails=(404, 409), measure="start")
async def start_instance(services: Services, id: str, body: StartInstanceRequest | None = None) -> Instance:
    """Boot a stopped instance."""
    return await services.instances.start(id, body or StartInstanceRequest())


@routes.post("/instances/{id}/stop", Scope.INSTANCE_WRITE, fails=(400, 404, 409), measure="stop")
async def stop_instance(services: Services, id: str, body: StopInstanceRequest | None = None) -> Instance:
    """Shut the guest down."""
    return await services.instances.stop(id, body or StopInstanceRequest())


@routes.post("/instances/{id}/standby", Scope.INSTANCE_WRITE, fails=(400, 404, 409, 501), measure="standby")
async def standby_instance(services: Services, id: str, body: StandbyInstanceRequest | None = None) -> Instance:
    """Save memory to disk and free everything else."""
    return await services.instances.standby(id, body or StandbyInstanceRequest())


@routes.post("/instances/{id}/restore", Scope.INSTANCE_WRITE, fails=(404, 409), measure="restore")
async def restore_instance(services: Services, id: str) -> Instance:
    """Bring an instance back from standby."""
    return await services.instances.restore(id)


@routes.post("/instances/{id}/fork", Scope.INSTANCE_WRITE, status=201, fails=(400, 404, 409, 501))
async def fork_instance(services: Services, id: str, body: ForkInstanceRequest) -> Instance:
    """A new instance from the state of another."""
    return await services.instances.fork(id, body)


@routes.get("/instances/{id}/wait", Scope.INSTANCE_READ, fails=(400, 404, 409), unlimited=True)
async def wait_for_state(services: Services, id: str, query: WaitQuery) -> WaitForStateResponse:
    """Wait until an instance is in a state, or can no longer reach it."""
    if query.state is InstanceState.UNKNOWN:
        raise InvalidRequest("Unknown is nothing to wait for", code="invalid_state")
    seconds = parse_duration(query.timeout, code="invalid_timeout")
    if seconds <= 0:
        raise InvalidRequest("timeout must be greater than 0", code="invalid_timeout")
    return await services.instances.wait_state(id, query.state, min(seconds, _LONGEST_WAIT))


@routes.get(
    "/instances/{id}/logs",
    Scope.INSTANCE_READ,
    fails=(404, 409),
    media_type="text/event-stream",
    unlimited=True,
    headers=SSE_HEADERS,
)
async def get_logs(services: Services, id: str, query: LogQuery) -> EventStream:
    """The log of an instance as server-sent events.

    Each event is one line, as a JSON string.
    """
    wanted = Lines(
        tail=query.tail,
        since=parse_moment(query.since, "since") if query.since else None,
        run=query.run,
        follow=query.follow,
        positions=query.positions,
        times=query.times,
        after=query.after,
    )
    path = await services.instances.log_path(id, query.source)
    async with AsyncExitStack() as stack:
        if query.follow and query.source is LogSource.APP:
            await stack.enter_async_context(services.policies.using(id, "logs"))
        try:
            stream = await LogStream.open(str(path), wanted)
        except FileNotFoundError:
            raise NotFound(f"there is no {query.source} log yet", code="log_not_found") from None
        return EventStream(UsedStream(stream, stack.pop_all()))


@routes.get("/instances/{id}/stat", Scope.INSTANCE_READ, fails=(400, 404, 409))
async def stat_path(services: Services, id: str, query: StatQuery) -> PathInfo:
    """Information on a path in the guest."""
    async with services.policies.using(id, "stat"):
        return await services.instances.stat(id, query.path, query.follow_links)


@routes.get("/instances/{id}/stats", Scope.INSTANCE_READ, fails=(404, 409))
async def get_stats(services: Services, id: str) -> InstanceStats:
    """Current resource usage of an instance."""
    return await services.instances.stats(id)


@routes.get("/stats", Scope.INSTANCE_READ)
async def get_usage(services: Services) -> UsageOfAll:
    """Current resource usage of all instances.

    Extension. Up to a second old; counters are totals, so that two answers give a rate. It does not ask guests.
    """
    return await services.instances.usage()


@routes.post("/instances/{id}/volumes/{volumeId}", Scope.VOLUME_WRITE, fails=(400, 404, 409, 501))
async def attach_volume(services: Services, id: str, volumeId: str, body: AttachVolumeRequest) -> Instance:
    """Attach a volume and mount it."""
    return await services.instances.attach_volume(id, volumeId, body)


@routes.delete("/instances/{id}/volumes/{volumeId}", Scope.VOLUME_WRITE, fails=(404, 409, 501))
async def detach_volume(services: Services, id: str, volumeId: str) -> Instance:
    """Unmount a volume and detach it."""
    return await services.instances.detach_volume(id, volumeId)


@routes.post("/instances/{id}/snapshots", Scope.SNAPSHOT_WRITE, status=201, fails=(400, 404, 409, 501))
async def create_snapshot(services: Services, id: str, body: CreateSnapshotRequest) -> Snapshot:
    """Capture an instance."""
    return await services.snapshots.create(id, body)


@routes.post("/instances/{id}/snapshots/{snapshotId}/restore", Scope.SNAPSHOT_WRITE, fails=(400, 404, 409, 501))
async def restore_snapshot(
    services: Services, id: str, snapshotId: str, body: RestoreSnapshotRequest | None = None
) -> Instance:
    """Restore an instance to one of its snapshots."""
    return await services.snapshots.restore(id, snapshotId, body or RestoreSnapshotRequest())
