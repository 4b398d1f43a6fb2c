"""A server on fakes that live: states change, logs grow, counters run, a shell answers. For the browser's tests, for
pictures, and to work on the UI without a guest:

    ip netns add ui; ip netns exec ui ip link set lo up
    ip netns exec ui .venv/bin/python -m tests.ui.world --port 8080 --instances 40

prints the port and a token with all scopes, as JSON, once it serves.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import trio
from msgspec import UNSET

from hypeman import assets
from hypeman.builds.types import Build, BuildStatus
from hypeman.devices.types import AvailableDevice
from hypeman.egress.types import AccessAction, AccessDefault, AccessRule, EgressAccess, EgressApproval, EgressRecord
from hypeman.errors import NameConflict
from hypeman.events.types import Event, EventFilter, Kind
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import CopyEntry, FileKind
from hypeman.ids import new_id
from hypeman.images.types import CreateImageRequest, Image, ImageStatus, LayerProgress, Progress
from hypeman.ingress.types import CreateIngressRequest, IngressMatch, IngressRule, IngressTarget
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    Snapshot,
    SnapshotKind,
)
from hypeman.instances.model.types import (
    CreateInstanceRequest,
    ForkInstanceRequest,
    HealthState,
    Instance,
    InstanceHealthStatus,
    InstanceNetwork,
    InstanceState,
    InstanceUsage,
    LogSource,
    StandbyInstanceRequest,
    UpdateInstanceRequest,
    UsageOfAll,
)
from hypeman.metering.types import Query, UsageBy, UsageReport, UsageRow
from hypeman.network.types import PortMapping
from hypeman.resources.types import DiskBreakdown, ResourceAllocation, Resources, ResourceStatus
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_tcp
from hypeman.server.sessions import Sessions
from hypeman.server.types import (
    Capabilities,
    DefaultRuntime,
    HostPlatform,
    ImageCapabilities,
    NetworkCapabilities,
    Runtime,
    ServerVersion,
)
from hypeman.store import Store
from hypeman.telemetry import traces
from hypeman.tokens import mint
from hypeman.volumes.types import CreateVolumeRequest, VolumeAttachment
from tests.fakes.services import FakeWorld
from tests.fakes.services.common import DIGEST, normalized
from tests.fakes.services.egress import FakeEgress, FakeEgressRecords
from tests.fakes.services.images import FakeImages
from tests.fakes.services.instances import FakeInstances, FakeSnapshots
from tests.fakes.services.records import FakeEvents, FakeFollower, FakeMetering
from tests.fakes.services.sessions import FakeCopyOut, FakeExec

SECRET = "a secret that is long enough for HS256"
BOOT = (("Created", 0.5), ("Initializing", 1.1))
"""State and seconds on the way to Running."""
NAMES = (
    ("web", "docker.io/library/nginx:alpine"),
    ("api", "ghcr.io/acme/api:2.4.1"),
    ("worker", "ghcr.io/acme/worker:2.4.1"),
    ("postgres", "docker.io/library/postgres:17"),
    ("redis", "docker.io/library/redis:8"),
    ("agent", "ghcr.io/acme/agent:0.9"),
    ("runner", "ghcr.io/acme/ci-runner:3"),
    ("notebook", "quay.io/jupyter/base-notebook:latest"),
)
SHELL = {
    "uname -a": "Linux web 6.12.58-hypeman #1 SMP x86_64 GNU/Linux",
    "ls": "bin  dev  docker-entrypoint.d  etc  home  lib  proc  root  run  srv  sys  tmp  usr  var",
    "nginx -v": "nginx version: nginx/1.29.3",
    "free -m": "              total        used        free\r\nMem:             983         118         702",
    "df -h /": "Filesystem      Size  Used Avail Use% Mounted on\r\noverlay         9.8G  6.2M  9.3G   1% /",
}
LINES = (
    '10.100.0.1 - - "GET / HTTP/1.1" 200 615',
    '10.100.0.1 - - "GET /assets/app.css HTTP/1.1" 200 18230',
    '10.100.0.1 - - "POST /api/session HTTP/1.1" 201 94',
    '10.100.0.7 - - "GET /healthz HTTP/1.1" 200 2',
    '10.100.0.9 - - "GET /missing HTTP/1.1" 404 153',
    "[notice] 31#31: signal process started",
)


class Shell(FakeExec):
    """With a TTY a prompt and a few answers; without one, what the page asks of a guest."""

    def __init__(self, request: ExecRequest, folder: dict[str, list[str]]) -> None:
        super().__init__(request)
        self._folder = folder
        self._line = b""
        if request.tty:
            self._send.send_nowait(b"\x1b[1;32mweb\x1b[0m:\x1b[1;34m/\x1b[0m# ")
        elif request.command[3:4] == ("ls",):
            found = folder.get(request.command[4])
            text = "\n".join(found) + "\n" if found is not None else f"sh: can't cd to {request.command[4]}\n"
            self._send.send_nowait(text.encode())
            self._send.send_nowait(0 if found is not None else 2)

    async def resize(self, rows: int, cols: int) -> None:
        self.sizes.append((rows, cols))

    async def send_stdin(self, data: bytes) -> None:
        for byte in data:
            if byte not in b"\r\n":
                self._line += bytes([byte])
                await self._send.send(bytes([byte]))
                continue
            line, self._line = self._line.decode(), b""
            if line == "exit":
                await self._send.send(b"\r\n")
                await self._send.send(0)
                return
            answer = SHELL.get(line, f"sh: {line.split()[0]}: not found" if line else "")
            if line.startswith("echo "):
                answer = line[5:]
            prompt = "\x1b[1;32mweb\x1b[0m:\x1b[1;34m/\x1b[0m# "
            await self._send.send(f"\r\n{answer}{chr(13) + chr(10) if answer else ''}{prompt}".encode())


@dataclass
class LiveFollower(FakeFollower):
    async def __anext__(self) -> list[Event]:
        assert isinstance(self.events, LiveEvents)
        while True:
            changed = self.events.changed
            cursor, self.cursor = self.cursor, self.events.last
            if batch := await self.events.list(cursor, self.wanted, 1000):
                return batch
            with trio.move_on_after(15):
                await changed.wait()
                continue
            return []


class LiveEvents(FakeEvents):
    def __init__(self) -> None:
        super().__init__()
        self.changed = trio.Event()

    def add(self, kind: Kind, action: str, name: str, **more: Any) -> Event:
        made = super().add(kind, action, name, **more)
        self.changed.set()
        self.changed = trio.Event()
        return made

    def about(self, what: Kind, action: str, key: str, name: str, /, *, ago: float = 0, **data: Any) -> None:
        event = self.add(what, action, name, **({"data": data} if data else {}))
        about = msgspec.structs.replace(event.object, id=key)
        when = event.time - timedelta(seconds=ago)
        self.logged[-1] = msgspec.structs.replace(event, object=about, time=when)

    def follow(self, cursor: int, wanted: EventFilter) -> LiveFollower:
        return LiveFollower(self, cursor, wanted)


class LiveInstances(FakeInstances):
    def __init__(self, logs: Path, events: LiveEvents, nursery: trio.Nursery) -> None:
        super().__init__(logs)
        self._events = events
        self._nursery = nursery
        self._started = trio.current_time()
        self.new_rules: Callable[[str, tuple[AccessRule, ...]], object] = lambda name, rules: None
        self.folder: dict[str, list[str]] = {
            "/": ["bin/", "docker-entrypoint.sh", "etc/", "home/", "tmp/", "var/"],
            "/etc": ["hostname", "nginx/", "passwd"],
            "/tmp": [],
            "/etc/nginx": ["conf.d/", "mime.types", "nginx.conf"],
        }

    def moved(self, instance: Instance, state: InstanceState, **changes: Any) -> Instance:
        now = datetime.now(UTC)
        spent = dict(instance.phase_durations_ms or {})
        if instance.current_phase and instance.current_phase_since:
            passed = (now - instance.current_phase_since).total_seconds() * 1000
            spent[instance.current_phase] = spent.get(instance.current_phase, 0) + round(passed)
        spent.setdefault(state.value.lower(), 0)
        changed = self._change(
            instance,
            state=state,
            phase_durations_ms=spent,
            current_phase=state.value.lower(),
            current_phase_since=now,
            **changes,
        )
        facts: dict[str, Any] = {"from": instance.state.value, "to": state.value}
        self._events.about(Kind.INSTANCE, "state_changed", instance.id, instance.name, **facts)
        return changed

    def _move(self, what: str, ref: str, wanted: InstanceState, after: InstanceState, request: Any = None) -> Instance:
        instance = super()._move(what, ref, wanted, after, request)
        return self.moved(self._change(instance, state=wanted), after)

    async def standby(self, ref: str, request: StandbyInstanceRequest) -> Instance:
        with self._phase("standby", ref):
            with traces.span("PauseVm"):
                await trio.sleep(0.02)
            with traces.span("SaveMemory"):
                await trio.sleep(0.2)
            return await super().standby(ref, request)

    async def restore(self, ref: str) -> Instance:
        with self._phase("restore", ref):
            return await super().restore(ref)

    def _phase(self, name: str, ref: str) -> AbstractContextManager[Any]:
        instance = self.find(ref)
        return traces.span(name, about={traces.INSTANCE: instance.id, traces.INSTANCE_NAME: instance.name})

    async def create(self, request: CreateInstanceRequest) -> Instance:
        made = await super().create(request)
        made = self._change(
            made,
            state=InstanceState.CREATED,
            created_at=datetime.now(UTC),
            phase_durations_ms={"created": 0},
            current_phase="created",
            current_phase_since=datetime.now(UTC),
            ports=request.ports,
            vcpus=request.vcpus or 2,
            size=request.size or "1GB",
            overlay_size=request.overlay_size or "10GB",
            network=InstanceNetwork(
                enabled=True,
                name="default",
                ip=f"10.100.1.{len(self.instances) % 250}",
                groups=request.network.groups or UNSET,
            ),
        )
        self._events.about(Kind.INSTANCE, "created", made.id, made.name, image=made.image, state="Created")
        self._nursery.start_soon(self._boot, made.id)
        return made

    async def _boot(self, instance_id: str) -> None:
        log = self.log_directory / f"{self.instances[instance_id].name}-app.log"
        for state, seconds in BOOT:
            if instance_id not in self.instances:
                return
            if self.instances[instance_id].state != state:
                self.moved(self.instances[instance_id], InstanceState(state))
            with log.open("a") as file:
                file.write(f"[    0.000000] Linux version 6.12.58-hypeman: {state}\n")
            await trio.sleep(seconds)
        if instance_id in self.instances:
            self.moved(self.instances[instance_id], InstanceState.RUNNING, started_at=datetime.now(UTC))
            with log.open("a") as file:
                file.write("ready for start up\n")

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        instance = self.find(ref)
        await super().delete(ref, graceful=graceful)
        self._events.about(Kind.INSTANCE, "deleted", instance.id, instance.name, state=instance.state.value)

    async def fork(self, ref: str, request: ForkInstanceRequest) -> Instance:
        source = self.find(ref)
        if any(instance.name == request.name for instance in self.instances.values()):
            raise NameConflict(f"there is an instance {request.name} already")
        made = await super().fork(ref, request)
        made = self._change(made, image=source.image, created_at=datetime.now(UTC), vcpus=source.vcpus)
        self._events.about(Kind.INSTANCE, "created", made.id, made.name, image=made.image, forked_from=source.id)
        return made

    async def update(self, ref: str, request: UpdateInstanceRequest) -> Instance:
        instance = await super().update(ref, request)
        self._events.about(Kind.INSTANCE, "updated", instance.id, instance.name, fields="ports")
        if request.network is not None and request.network.egress.rules is not None:
            self.new_rules(instance.name, request.network.egress.rules)
        return self._change(instance, ports=request.ports if request.ports is not None else instance.ports)

    async def exec(self, ref: str, request: ExecRequest) -> Shell:
        self.find(ref)
        session = Shell(request, self.folder)
        self.sessions.append(session)
        return session

    async def copy_to(self, ref: str, request: CpRequest) -> Any:
        folder, _, name = request.guest_path.rpartition("/")
        names = self.folder.setdefault(folder or "/", [])
        if name not in names:
            names.append(name)
        return await super().copy_to(ref, request)

    async def copy_from(self, ref: str, request: CpRequest) -> FakeCopyOut:
        name = request.guest_path.rpartition("/")[2]
        found = self.files.get(request.guest_path)
        data = found[1] if found is not None and found[1] is not None else b"worker_processes auto;\n"
        entry = CopyEntry(path=name, kind=FileKind.FILE, mode=0o644, size=len(data), mtime=1_760_000_000, uid=0, gid=0)
        return FakeCopyOut([entry, data])

    async def log_path(self, ref: str, source: LogSource) -> Path:
        path = await super().log_path(ref, source)
        if source is not LogSource.APP and not path.exists():
            path.write_text(f"{source} log of {self.find(ref).name}\n")
        path.touch()
        return path

    async def usage(self) -> UsageOfAll:
        now = trio.current_time() - self._started
        found = []
        for number, one in enumerate(self.instances.values()):
            if one.state is not InstanceState.RUNNING:
                continue
            phase = number * 1.7
            busy = 0.05 + 0.9 * (number % 5 == 1) + 0.3 * (number % 3 == 0)
            wave = 8 * (1 - math.cos(now / 8 + phase)) * busy / 2
            memory = 2**20 * (140 + 90 * (number % 4) + 30 * math.sin(now / 20 + phase) + 8 * math.sin(now * 3 + phase))
            traffic = (now + 10 * (1 - math.cos(now / 5 + phase))) * 40_000 * (1 + number % 7)
            found.append(
                InstanceUsage(
                    instance_id=one.id,
                    instance_name=one.name,
                    cpu_seconds=round(now * busy + wave, 2),
                    memory_rss_bytes=round(memory),
                    memory_vms_bytes=2**30,
                    allocated_vcpus=2,
                    allocated_memory_bytes=2**30,
                    network_rx_bytes=round(traffic),
                    network_tx_bytes=round(traffic / 3),
                )
            )
        return UsageOfAll(time=datetime.now(UTC), instances=tuple(found))


class LiveEgress(FakeEgress):
    """A guest repeats a request that was denied once, a moment later."""

    def __init__(self, instances: LiveInstances, events: LiveEvents, nursery: trio.Nursery) -> None:
        super().__init__(instances)
        self._events = events
        self._nursery = nursery
        self._repeated: set[str] = set()
        self._followers: list[trio.MemorySendChannel[EgressRecord]] = []

    def replace_rules(self, name: str, rules: tuple[AccessRule, ...]) -> None:
        policy = self.policies[name]
        assert isinstance(policy.access, EgressAccess)
        access = msgspec.structs.replace(policy.access, rules=rules)
        self.policies[name] = msgspec.structs.replace(policy, access=access)

    def ask(self, instance: Instance, method: str, path: str) -> None:
        now = datetime.now(UTC)
        held = EgressApproval(
            id=new_id(),
            instance_id=instance.id,
            rule="writes",
            scheme="https",
            host="api.github.com",
            port=443,
            method=method,
            path=path,
            waiting=1,
            since=now,
            expires_at=now + timedelta(minutes=10),
        )
        self.held[held.id] = held
        self._note("approval_requested", held)

    async def decide(self, ref: str, approval: str, *, allow: bool, seconds: float) -> EgressApproval:
        done = await super().decide(ref, approval, allow=allow, seconds=seconds)
        self._note("approved" if allow else "denied", done)
        self.record(
            self.policy(ref).instance_name,
            host=done.host,
            method=done.method,
            reason="ok" if allow else "not_approved",
            decision="approved" if allow else "denied",
            rule=done.rule,
        )
        if not allow and done.path not in self._repeated:
            self._repeated.add(done.path)
            self._nursery.start_soon(self._repeat, ref, done)
        return done

    async def _repeat(self, ref: str, before: EgressApproval) -> None:
        await trio.sleep(2)
        self.ask(self.instances.find(ref), before.method, before.path)

    def record(self, name: str, *, age: float = 0, **about: Any) -> None:
        """A request of the instance ``name`` that ended ``age`` seconds ago."""
        passed = about["reason"] == "ok"
        made = EgressRecord(
            time=datetime.now(UTC) - timedelta(seconds=age),
            kind="request",
            port=443,
            status=200 if passed else 403,
            injected=passed,
            credentials=("API_KEY",) if passed else (),
            bytes_up=820 + round(40 * age),
            bytes_down=12_400 if passed else 0,
            ms=48.0 + age,
            http=2,
            **about,
        )
        self.records.setdefault(name, []).append(made)
        for follower in self._followers:
            with suppress(trio.BrokenResourceError, trio.WouldBlock):
                follower.send_nowait(made)

    async def requests(self, ref: str, *, tail: int, follow: bool) -> FakeEgressRecords:
        send, receive = trio.open_memory_channel[EgressRecord](100)
        self._followers.append(send)
        kept = self.records.get(self.policy(ref).instance_name, [])
        return FakeEgressRecords(kept[max(0, len(kept) - tail) :], receive if follow else None)

    def _note(self, action: str, about: EgressApproval) -> None:
        facts: dict[str, Any] = {"rule": about.rule, "host": about.host, "method": about.method, "path": about.path}
        self._events.add(Kind.EGRESS, action, about.id, instance_id=about.instance_id, data=facts)


class LiveSnapshots(FakeSnapshots):
    instances: LiveInstances

    async def create(self, ref: str, request: CreateSnapshotRequest) -> Snapshot:
        made = await super().create(ref, request)
        made = msgspec.structs.replace(made, created_at=datetime.now(UTC), size_bytes=312 << 20)
        self.snapshots[made.id] = made
        self.instances._events.about(Kind.SNAPSHOT, "created", made.id, made.name or "", kind=made.kind.value)
        return made

    async def delete(self, snapshot: str) -> None:
        gone = await self.get(snapshot)
        await super().delete(snapshot)
        self.instances._events.about(Kind.SNAPSHOT, "deleted", gone.id, gone.name or "")

    async def fork(self, snapshot: str, request: ForkSnapshotRequest) -> Instance:
        made = await super().fork(snapshot, request)
        source = await self.get(snapshot)
        self.instances._events.about(
            Kind.INSTANCE, "created", made.id, made.name, forked_from=source.source_instance_id, snapshot=source.id
        )
        return made


class LiveImages(FakeImages):
    def __init__(self, events: LiveEvents) -> None:
        super().__init__()
        self._events = events
        self._begun: dict[str, float] = {}

    async def create(self, request: CreateImageRequest) -> Image:
        made = await super().create(request)
        self._begun[made.name] = trio.current_time()
        self.images[made.name] = msgspec.structs.replace(made, status=ImageStatus.PULLING, created_at=datetime.now(UTC))
        self._events.about(Kind.IMAGE, "created", made.name, made.name, status="pulling")
        return self.images[made.name]

    async def get(self, ref: str) -> Image:
        name = normalized(ref)
        image = self.images.get(name) or await super().get(ref)
        if not image.status.is_final and trio.current_time() - self._begun.get(name, 0) > 5:
            image = self.images[name] = msgspec.structs.replace(image, status=ImageStatus.READY, size_bytes=54 << 20)
            self._events.about(Kind.IMAGE, "ready", name, name, status="ready")
        return image

    async def progress(self, ref: str) -> Progress:
        image = await self.get(ref)
        share = min(1.0, (trio.current_time() - self._begun.get(image.name, 0)) / 4)
        sizes = (31_400_000, 18_200_000, 4_100_000, 900_000)
        layers = tuple(
            LayerProgress(f"sha256:{number:02x}" + "5e" * 31, size, min(size, int(size * share * (1 + number / 3))))
            for number, size in enumerate(sizes)
        )
        return Progress(image.status, layers, int(9e7 * share))


class LiveMetering(FakeMetering):
    """A ledger with one entry for each instance, and one for an instance that was deleted."""

    def __init__(self, instances: LiveInstances) -> None:
        super().__init__()
        self._instances = instances

    async def report(self, query: Query) -> UsageReport:
        now = datetime.now(UTC)
        found: dict[str, UsageRow] = {}
        total = UsageRow(
            begin=now - timedelta(days=9), end=now, cpu_seconds=0, memory_gb_hours=0, disk_gb_hours=0,
            network_rx_bytes=0, network_tx_bytes=0,
        )  # fmt: skip
        living = [(instance.id, instance.name, instance.tags or {}) for instance in self._instances.instances.values()]
        for number, (key, name, tags) in enumerate([*living, ("gone", "old-report", {})]):
            if query.instance not in ("", key, name):
                continue
            value = tags.get(query.tag, "")
            about: dict[UsageBy, tuple[str, dict[str, str]]] = {
                UsageBy.INSTANCE: (key, {"instance_id": key, "instance_name": name}),
                UsageBy.TAG: (value, {"value": value}),
                UsageBy.DAY: (str(number % 7), {"day": f"2026-11-2{number % 7}"}),
            }
            group, fields = about[query.by]
            base = found.get(group, msgspec.structs.replace(total, cpu_seconds=0, **fields))
            found[group] = _used(base, number)
        for number, _ in enumerate(found):
            total = _used(total, number)
        return UsageReport(by=query.by, rows=tuple(found.values()), total=total)


def _used(row: UsageRow, number: int) -> UsageRow:
    return msgspec.structs.replace(
        row,
        cpu_seconds=row.cpu_seconds + 3600 * (1 + number % 9),
        memory_gb_hours=row.memory_gb_hours + 14.5 * (1 + number % 4),
        disk_gb_hours=row.disk_gb_hours + 2160,
        network_rx_bytes=row.network_rx_bytes + (number + 1) * 70_000_000,
        network_tx_bytes=row.network_tx_bytes + (number + 1) * 9_000_000,
    )


class HostView:
    def __init__(self, instances: LiveInstances) -> None:
        self._instances = instances

    async def get(self) -> Resources:
        living = [
            instance for instance in self._instances.instances.values() if instance.state is InstanceState.RUNNING
        ]

        def status(kind: str, capacity: int, ratio: float, allocated: int) -> ResourceStatus:
            limit = int(capacity * ratio)
            return ResourceStatus(
                type=kind,
                capacity=capacity,
                effective_limit=limit,
                allocated=allocated,
                available=max(0, limit - allocated),
                oversub_ratio=ratio,
                source="detected",
            )

        return Resources(
            cpu=status("cpu", 32, 4.0, 2 * len(living)),
            memory=status("memory", 256 << 30, 1.0, len(living) << 32),
            disk=status("disk", 4 << 40, 1.0, len(self._instances.instances) * 10 << 30),
            network=status("network", 1_250_000_000, 1.0, 310_000_000),
            allocations=tuple(
                ResourceAllocation(
                    instance_id=one.id,
                    instance_name=one.name,
                    cpu=2,
                    memory_bytes=(1 + number % 4) << 30,
                    disk_bytes=10 << 30,
                )
                for number, one in enumerate(living)
            ),
            disk_breakdown=DiskBreakdown(
                images_bytes=8_200_000_000,
                oci_cache_bytes=3_100_000_000,
                volumes_bytes=120 << 30,
                overlays_bytes=41 << 30,
            ),
        )


class Abilities:
    async def get(self) -> Capabilities:
        return Capabilities(
            server=ServerVersion("0.1.0", "0.3.0"),
            host=HostPlatform("linux", "amd64"),
            default_runtime=DefaultRuntime("cloud-hypervisor", True),
            runtimes=(
                Runtime("cloud-hypervisor", True, ("standby", "fork", "hotplug")),
                Runtime("firecracker", False, ("standby", "fork")),
                Runtime("qemu", True, ("standby", "fork", "vgpu")),
            ),
            network=NetworkCapabilities("bridge", False, "10.100.0.1", "10.100.0.0/16"),
            images=ImageCapabilities(("linux/amd64",), "linux/amd64"),
            features=("instances", "images"),
        )


class LiveWorld(FakeWorld):
    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        super().__init__(folder)
        self.events: LiveEvents = LiveEvents()
        self.instances: LiveInstances = LiveInstances(folder, self.events, nursery)
        self.snapshots = LiveSnapshots(self.instances)
        self.images = LiveImages(self.events)
        self.egress: LiveEgress = LiveEgress(self.instances, self.events, nursery)
        self.instances.new_rules = self.egress.replace_rules
        self.metering = LiveMetering(self.instances)
        for part in (self.policies, self.ingresses):
            part.instances = self.instances
        self.resources = HostView(self.instances)
        self.capabilities = Abilities()
        self.quiet = False

    @property
    def services(self) -> Any:
        return replace(super().services, resources=self.resources, capabilities=self.capabilities)

    async def populate(self, count: int) -> None:
        """``count`` instances in all states, and something of everything else."""
        now = datetime.now(UTC)
        chance = random.Random(7)
        for number in range(count):
            kind, image = NAMES[number % len(NAMES)]
            name = kind if number < len(NAMES) else f"{kind}-{number // len(NAMES) + 1}"
            state = InstanceState.RUNNING
            if number >= 6:
                state = chance.choices(
                    [InstanceState.RUNNING, InstanceState.STANDBY, InstanceState.STOPPED, InstanceState.UNKNOWN],
                    [60, 22, 16, 1 if number > 10 else 0],
                )[0]
            age = timedelta(minutes=3 + 47 * number)
            self.instances.add(
                name,
                state,
                image=image,
                hypervisor="cloud-hypervisor",
                overlay_size="10GB",
                tags={"team": ("core", "data", "ml")[number % 3], "env": "production" if number % 4 else "staging"},
                env={"NODE_ENV": "production", "LISTEN": "0.0.0.0:8080", "LOG_LEVEL": "info"},
                ports=(PortMapping(host_port=8000 + number, guest_port=80),) if number < 3 else (),
                phase_durations_ms={"pulling": 2310, "created": 214, "initializing": 868, state.value.lower(): 61_000},
                current_phase=state.value.lower(),
                current_phase_since=now - age,
                started_at=now - age,
                state_error="the VMM has exited with signal 9" if state is InstanceState.UNKNOWN else None,
                health_status=InstanceHealthStatus(status=HealthState.HEALTHY if number < 3 else HealthState.DISABLED),
            )
            made = next(reversed(self.instances.instances.values()))
            network = InstanceNetwork(
                enabled=True,
                name="default",
                ip=f"10.100.{number // 250}.{2 + number % 250}",
                mac=f"02:00:00:00:00:{number % 256:02x}",
                bandwidth_download="1gbps",
                bandwidth_upload="1gbps",
            )
            self.instances._change(made, created_at=now - age, network=network)
            if number < 60:
                self.events.about(
                    Kind.INSTANCE, "created", made.id, name, image=image, state="Created", ago=age.total_seconds()
                )
                self.events.about(
                    Kind.INSTANCE,
                    "state_changed",
                    made.id,
                    name,
                    ago=age.total_seconds() - 3,
                    **{"from": "Initializing", "to": state.value},
                )
        self.events.logged = [
            msgspec.structs.replace(event, cursor=number + 1)
            for number, event in enumerate(sorted(self.events.logged, key=lambda one: one.time))
        ]
        for _, image in NAMES[: max(0, count)]:
            self.images.images[image] = Image(
                image,
                DIGEST,
                ImageStatus.READY,
                now - timedelta(days=2),
                platform="linux/amd64",
                size_bytes=len(image) * 3_100_000,
                entrypoint=("/docker-entrypoint.sh",),
                cmd=("nginx", "-g", "daemon off;"),
            )
        if count:
            await self._more(now)

    async def _more(self, now: datetime) -> None:
        self._write_log()
        await self._add_volumes()
        await self._add_snapshots(now)
        await self._add_ingress()
        self._add_build(now)
        self._add_devices()
        self._add_egress()

    def _write_log(self) -> None:
        with (self.log_directory / "web-app.log").open("w") as log:
            log.write("[    0.000000] Linux version 6.12.58-hypeman\n[    0.412030] hypeman-init: starting nginx\n")
            for number in range(400):
                log.write(f"2026-11-29T12:{number // 60:02d}:{number % 60:02d}Z {LINES[number % 5]}\n")

    async def _add_volumes(self) -> None:
        data = await self.volumes.create(CreateVolumeRequest(name="pgdata", size_gb=100, id="pgdata"))
        await self.volumes.create(CreateVolumeRequest(name="uploads", size_gb=20, id="uploads", tags={"team": "core"}))
        use = VolumeAttachment(
            instance_id=self.instances.find("postgres").id, mount_path="/var/lib/postgresql", readonly=False
        )
        self.volumes.volumes["pgdata"] = msgspec.structs.replace(data, attachments=(use,))

    async def _add_snapshots(self, now: datetime) -> None:
        first = await self.snapshots.create(
            "web", CreateSnapshotRequest(kind=SnapshotKind.STANDBY, name="before-upgrade")
        )
        second = await self.snapshots.create("web", CreateSnapshotRequest(kind=SnapshotKind.STANDBY, name="warm"))
        self.snapshots.snapshots[first.id] = msgspec.structs.replace(first, created_at=now - timedelta(hours=5))
        self.snapshots.snapshots[second.id] = msgspec.structs.replace(second, created_at=now - timedelta(minutes=40))
        for name in ("web-trial-1", "web-trial-2"):
            await self.snapshots.fork(second.id, ForkSnapshotRequest(name=name))

    async def _add_ingress(self) -> None:
        await self.ingresses.create(
            CreateIngressRequest(
                name="site",
                rules=(
                    IngressRule(
                        match=IngressMatch(hostname="shop.example.com"), target=IngressTarget(instance="web", port=80)
                    ),
                    IngressRule(
                        match=IngressMatch(hostname="api.example.com"), target=IngressTarget(instance="api", port=8080)
                    ),
                ),
            )
        )

    def _add_build(self, now: datetime) -> None:
        build = Build(
            id="b1", status=BuildStatus.READY, created_at=now - timedelta(hours=2), image_ref="team/shop:v3",
            duration_ms=48_200, builder_id="ci",
        )  # fmt: skip
        self.builds.builds[build.id] = build

    def _add_devices(self) -> None:
        self.devices.add("l40s", "0000:41:00.0")
        self.devices.free = [
            AvailableDevice(
                pci_address="0000:41:00.0",
                vendor_id="10de",
                device_id="26b9",
                iommu_group=41,
                vendor_name="NVIDIA Corporation",
                device_name="AD102GL [L40S]",
                current_driver="vfio-pci",
            ),
            AvailableDevice(
                pci_address="0000:42:00.0",
                vendor_id="10de",
                device_id="26b9",
                iommu_group=42,
                vendor_name="NVIDIA Corporation",
                device_name="AD102GL [L40S]",
                current_driver="nvidia",
            ),
            AvailableDevice(
                pci_address="0000:01:00.0",
                vendor_id="8086",
                device_id="1592",
                iommu_group=12,
                vendor_name="Intel Corporation",
                device_name="Ethernet Controller E810-C",
                current_driver="ice",
                reason="it is the host's uplink",
            ),
            AvailableDevice(
                pci_address="0000:04:00.0",
                vendor_id="144d",
                device_id="a80a",
                iommu_group=15,
                vendor_name="Samsung Electronics",
                device_name="NVMe SSD Controller PM9A1",
                current_driver="nvme",
                reason="the host has mounted a file system of it",
            ),
        ]

    def _add_egress(self) -> None:
        """A guest with rules, requests that ended, and two that wait for approval."""
        agent = self.instances.find("agent")
        self.egress.allow(agent)
        rules = (
            AccessRule(name="model", action=AccessAction.ALLOW, hosts=("api.example.com",)),
            AccessRule(
                name="reads", action=AccessAction.ALLOW, hosts=("api.github.com",), methods=("GET",),
                paths=("/repos/acme/*",),
            ),
            AccessRule(name="writes", action=AccessAction.ASK, hosts=("api.github.com",)),
        )  # fmt: skip
        self.egress.policies["agent"] = msgspec.structs.replace(
            self.egress.policies["agent"], access=EgressAccess(rules=rules, default=AccessDefault.DENY)
        )
        for number in range(9):
            if number % 4 == 3:
                about = {"host": "paste.example.net", "reason": "host_denied", "decision": "denied", "rule": "default"}
            else:
                about = {"host": "api.example.com", "reason": "ok", "decision": "allowed", "rule": "model"}
            self.egress.record("agent", age=70 - 7 * number, method="POST" if number % 2 else "GET", **about)
        self.egress.ask(agent, "POST", "/repos/acme/site/pulls")
        self.egress.ask(agent, "DELETE", "/repos/acme/site/git/refs/heads/draft")

    async def live(self) -> None:
        """Logs grow."""
        number = 0
        while True:
            await trio.sleep(1.1)
            if not self.quiet and any(instance.name == "web" for instance in self.instances.instances.values()):
                number += 1
                with (self.log_directory / "web-app.log").open("a") as log:
                    log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {LINES[number % len(LINES)]}\n")

    async def churn(self, per_second: float) -> None:
        """States of random instances change."""
        chance = random.Random(3)
        everybody = list(self.instances.instances)
        while True:
            await trio.sleep(1 / per_second)
            one = self.instances.instances.get(chance.choice(everybody))
            if one is not None:
                running = one.state is InstanceState.RUNNING
                self.instances.moved(one, InstanceState.STANDBY if running else InstanceState.RUNNING)


@asynccontextmanager
async def serving(
    port: int, count: int, *, events_per_second: float = 0, folder: Path | None = None
) -> AsyncIterator[tuple[LiveWorld, int]]:
    """The world on 127.0.0.1:``port`` (0: any), and its port."""
    with tempfile.TemporaryDirectory() as made:
        directory = folder or Path(made)
        store = Store.open(directory / "store")
        async with store.serving(), trio.open_nursery() as nursery:
            world = LiveWorld(directory, nursery)
            await world.populate(count)
            sockets = bind_tcp("127.0.0.1", port)
            port = sockets[0].getsockname()[1]
            settings = ServerSettings(SECRET, url=f"http://localhost:{port}")
            app = build_app(world.services, settings, sessions=Sessions(store, SECRET), ui=assets.find_ui())
            shutdown = trio.Event()
            await nursery.start(Server(app, plain=app.plain, grace=0.5).run, sockets, shutdown)
            nursery.start_soon(world.live)
            if events_per_second:
                nursery.start_soon(world.churn, events_per_second)
            yield world, port
            nursery.cancel_scope.cancel()
        store.close()


async def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--instances", type=int, default=40)
    parser.add_argument("--events", type=float, default=0, help="changes of state a second")
    given = parser.parse_args(arguments)
    async with serving(given.port, given.instances, events_per_second=given.events) as (_, port):
        print(json.dumps({"port": port, "token": mint(SECRET, subject="ann@example.com")}), flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main)
