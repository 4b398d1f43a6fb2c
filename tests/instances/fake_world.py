"""Instances on a host in memory, with faults.

    lab = Lab(store, paths)
    async with lab.running() as instances:      the service, as app.py would build it
    lab.fail_at(3)                              the fourth effect from now on raises
    lab.crash_at(3)                             there the server "dies": nothing after it happens any more
    lab.end_at(3)                               there the server is ended: all of its tasks are cancelled
    lab.world_as_text()                         everything that exists outside of the store

Effects are counted where they would touch the machine: network, egress, devices, disks, files and VMMs.
A crash leaves what was done; the next ``running`` is the next server, on the same store and machine.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

import trio

from hypeman.captures.compression import Compressor
from hypeman.config import Config
from hypeman.errors import InternalError, InUse, InvalidState, NotFound
from hypeman.guest.boot import CaCertificate
from hypeman.guest.failures import GuestLost, GuestTimeout
from hypeman.guest.limits import LIMITS
from hypeman.guest.protocol import Op
from hypeman.guest.types import Exited, GuestEvent, PathInfo, Ready, Started
from hypeman.host.cgroups import CGroups
from hypeman.host.files import Files
from hypeman.host.log_times import SUFFIX
from hypeman.hypervisor.catalog import Catalog
from hypeman.hypervisor.interface import ExitReason
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.images.records import HOLDERS, HolderRow
from hypeman.images.reference import host_platform, parse_platform, parse_reference
from hypeman.images.types import ImageConfig, ReadyImage
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.phases import utc_now
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.model.states import is_possible
from hypeman.instances.model.types import CreateInstanceRequest, InstanceState
from hypeman.instances.rows import INSTANCES
from hypeman.instances.service import Instances
from hypeman.instances.snapshots import Snapshots
from hypeman.network import leases
from hypeman.network.addressing import Subnet
from hypeman.network.asleep import Arrival
from hypeman.network.types import EgressMode, GuestNetwork, Lease, NetworkPlan, PortMapping, Reach
from hypeman.paths import Paths
from hypeman.resources.accounting import Limits
from hypeman.store import Store, Txn
from tests.fakes.fake_vmm import FakeDriver, FakeMachine, FakeVmm

DIGEST = "sha256:" + "1" * 64


class Crash(BaseException):
    """The server is dead. Not an Exception, so that nothing catches it."""


class HostFailed(InternalError):
    """What an effect was set to raise."""


class Bomb:
    """Counts effects and goes off at the wanted one."""

    def __init__(self) -> None:
        self.count = 0
        self.fail_at: int | None = None
        self.crash_at: int | None = None
        self.end_at: int | None = None
        self.end: Callable[[], object] = lambda: None
        """Cancels the server."""
        self.dead = False
        self.where = ""

    def tick(self, name: str) -> None:
        if self.dead:
            raise Crash
        number = self.count
        self.count += 1
        if number == self.fail_at:
            self.where = name
            raise HostFailed(f"{name} was set to fail")
        if number == self.end_at:
            self.where = name
            self.end()
        if number == self.crash_at:
            self.where = name
            self.dead = True
            raise Crash


class Effects:
    """A part of the host: a set of things that are there, each added and removed by an effect."""

    def __init__(self, kind: str, bomb: Bomb) -> None:
        self.kind = kind
        self.there: dict[str, str] = {}
        self._bomb = bomb

    async def add(self, name: str, value: str = "") -> None:
        await trio.lowlevel.checkpoint()
        self._bomb.tick(f"before {self.kind} +{name[:4]}")
        self.there[name] = value
        self._bomb.tick(f"after {self.kind} +{name[:4]}")

    async def remove(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        self._bomb.tick(f"before {self.kind} -{name[:4]}")
        self.there.pop(name, None)
        self._bomb.tick(f"after {self.kind} -{name[:4]}")


class FakeWaking:
    """Which instances packets are held for, and what became of packets."""

    def __init__(self, held: Effects) -> None:
        self._held = held
        self.on_arrival: Callable[[str, Arrival], bool] = lambda instance_id, arrival: False
        self.rejected: list[str] = []
        self.refused: list[Arrival] = []

    def listen(self, on_arrival: Callable[[str, Arrival], bool] | None) -> None:
        self.on_arrival = on_arrival or (lambda instance_id, arrival: False)

    def is_held(self, instance_id: str) -> bool:
        return instance_id in self._held.there

    def reject(self, instance_id: str) -> None:
        self.rejected.append(instance_id)

    def refuse(self, arrival: Arrival) -> None:
        self.refused.append(arrival)


class FakeNetwork:
    subnet = Subnet.parse("10.0.0.0/29")

    def __init__(self, bomb: Bomb) -> None:
        self.taps = Effects("tap", bomb)
        self.held = Effects("hold", bomb)
        self.waking = FakeWaking(self.held)

    async def start(self, living: list[Lease]) -> None:
        """What the kernel forwards is made to match the store when a server starts."""
        for lease in living:
            if lease.instance_id in self.taps.there:
                self.taps.there[lease.instance_id] = tap_text(lease)

    async def attach(self, lease: Lease, *, uid: int = 0, boots: bool = False) -> None:
        await self.taps.add(lease.instance_id, tap_text(lease))

    async def set_ports(self, lease: Lease) -> None:
        if lease.instance_id in self.taps.there:
            await self.taps.add(lease.instance_id, tap_text(lease))

    async def detach(self, lease: Lease) -> None:
        await self.taps.remove(lease.instance_id)

    async def hold(self, lease: Lease) -> None:
        await self.held.add(lease.instance_id, lease.ipv4)

    async def release(self, lease: Lease) -> None:
        if lease.instance_id in self.held.there:
            await self.held.remove(lease.instance_id)

    async def plug_in_again(self, lease: Lease, pid: int) -> bool:
        return True

    def guest_network(self, lease: Lease) -> GuestNetwork | None:
        if not lease.enabled:
            return None
        return GuestNetwork(lease.ipv4, 32, "10.0.0.1", lease.mac, "1.1.1.1", 1500)


def tap_text(lease: Lease) -> str:
    """A TAP as the lab shows it: the address behind it, whether it is closed, and the ports that lead there."""
    closed = ["closed"] if lease.reach.closed else []
    return " ".join([lease.ipv4, *closed, *(f"{each.host_port}:{each.guest_port}" for each in lease.ports)])


class FakeLeases:
    """Leases in the store; the ports that a server holds, which end with it."""

    def __init__(self, store: Any, network: FakeNetwork, bomb: Bomb) -> None:
        self._store = store
        self._network = network
        self._bomb = bomb
        self.held: dict[str, tuple[PortMapping, ...]] = {}
        """Instance → ports."""

    def take(self, txn: Txn, record: InstanceRecord, ports: tuple[PortMapping, ...]) -> Lease:
        plan = NetworkPlan(enabled=record.spec.network, ports=ports)
        return leases.take_lease(txn, record.id, plan, FakeNetwork.subnet)

    async def claim_ports(self, ports: tuple[PortMapping, ...], *, instance_id: str = "") -> FakeClaim:
        await trio.lowlevel.checkpoint()
        if ports:
            self._bomb.tick("port claim")
        self._store.read(lambda txn: leases.check_ports_free(txn, ports, str, instance_id=instance_id))
        return FakeClaim(self, ports)

    def set_ports(self, txn: Txn, instance_id: str, ports: tuple[PortMapping, ...]) -> None:
        leases.set_ports(txn, instance_id, ports, str)

    async def publish(self, instance_id: str) -> None:
        await self._network.set_ports(self._store.read(lambda txn: leases.get_lease(txn, instance_id)))

    def set_reach(self, txn: Txn, record: InstanceRecord) -> None:
        closed = record.spec.access is not None and record.spec.access.closes
        leases.set_reach(txn, record.id, EgressMode.ALL, Reach(closed=closed))

    async def enforce_reach(self, instance_id: str) -> None:
        await self._network.set_ports(self._store.read(lambda txn: leases.get_lease(txn, instance_id)))

    def release_ports(self, instance_id: str) -> None:
        self.held.pop(instance_id, None)

    def drop(self, txn: Txn, instance_id: str) -> None:
        leases.drop_lease(txn, instance_id, FakeNetwork.subnet)

    def default_rates(self, spec: InstanceSpec) -> InstanceSpec:
        return spec


class FakeClaim:
    def __init__(self, owner: FakeLeases, ports: tuple[PortMapping, ...]) -> None:
        self.ports = ports
        self._owner = owner

    def __enter__(self) -> FakeClaim:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keep(self, instance_id: str) -> None:
        self._owner.release_ports(instance_id)
        if self.ports:
            self._owner.held[instance_id] = self.ports


class FakeDevices:
    def __init__(self, bomb: Bomb) -> None:
        self.bound = Effects("device", bomb)

    async def bind(self, instance_id: str, *, uid: int = 0, gid: int = 0) -> None:
        await self.bound.add(instance_id)

    async def unbind(self, instance_id: str) -> None:
        await self.bound.remove(instance_id)

    def sysfs_paths(self, instance_id: str) -> tuple[str, ...]:
        return ()

    def claim(self, txn: Txn, instance_id: str, devices: tuple[str, ...], gpu_profile: str) -> tuple[str, ...]:
        return devices

    def release(self, txn: Txn, instance_id: str) -> None:
        pass

    def mdev_uuid(self, instance_id: str) -> str:
        return ""

    async def prepare(self) -> None:
        pass


class FakeEgress:
    """Which policy is in force for an instance: ``closed`` or nothing said."""

    def __init__(self, store: Any, bomb: Bomb) -> None:
        self._store = store
        self.policies = Effects("egress", bomb)

    async def enforce(self, record: InstanceRecord, lease: Lease) -> None:
        await self.policies.add(record.id, policy_text(record))

    async def release(self, instance_id: str) -> None:
        await self.policies.remove(instance_id)

    def guest_setup(self, record: InstanceRecord) -> tuple[Mapping[str, str], tuple[CaCertificate, ...]]:
        return {"HTTPS_PROXY": "http://10.0.0.1:1"}, ()

    def check(self, spec: InstanceSpec, values: Mapping[str, str]) -> None:
        pass

    def seal(self, txn: Txn, instance_id: str, values: Mapping[str, str]) -> None:
        pass

    def drop(self, txn: Txn, instance_id: str) -> None:
        pass

    async def refresh(self, instance_id: str) -> None:
        record = self._store.read(lambda txn: txn.get(INSTANCES, instance_id))
        if record is not None and record.handle is not None:
            await self.policies.add(record.id, policy_text(record))


def policy_text(record: InstanceRecord) -> str:
    return "closed" if record.spec.access is not None and record.spec.access.closes else ""


class FakeImages:
    """The image busybox, ready unless ``missing``: then a pull is an effect."""

    def __init__(self, disk: Path, bomb: Bomb) -> None:
        self._disk = disk
        self._bomb = bomb
        self.missing = False
        self.pulled = trio.Event()
        """A pull waits for it."""
        self.pulled.set()
        self.pulls = 0
        self.waiting = 0
        disk.parent.mkdir(parents=True, exist_ok=True)
        disk.write_bytes(b"image")
        self.settings = ImageConfig(entrypoint=("/init",), env={"A": "1"}, working_dir="/")

    def platform(self, text: str | None) -> str:
        return str(parse_platform(text)) if text else str(host_platform())

    async def wait_ready(self, name: str, platform: str | None = None) -> ReadyImage:
        known = self._is_known(name)
        await trio.lowlevel.checkpoint()
        if not known:
            raise NotFound(f"there is no image {name}")
        if self.missing:
            self.pulls += 1
            self.waiting += 1
            try:
                self._bomb.tick("before pull")
                await self.pulled.wait()
            finally:
                self.waiting -= 1
            self.missing = False
            self._bomb.tick("after pull")
        return self._image()

    def find_ready(self, name: str, platform: str | None = None) -> ReadyImage | None:
        return self._image() if self._is_known(name) and not self.missing else None

    async def abandon(self, name: str) -> None:
        await trio.lowlevel.checkpoint()

    @staticmethod
    def _is_known(name: str) -> bool:
        return parse_reference(name).repository == "library/busybox"

    def _image(self) -> ReadyImage:
        return ReadyImage(DIGEST, self._disk, "erofs", self.settings, 5, self.platform(None))

    def disk(self, digest: str) -> Path:
        return self._disk

    def root_fs(self, digest: str) -> str:
        return "erofs"

    def config(self, digest: str) -> ImageConfig:
        return self.settings

    def pin(self, txn: Txn, digest: str, holder: str) -> None:
        if digest != DIGEST or self.missing:
            raise InvalidState(f"image {digest} is no longer there; ask again")
        txn.put(HOLDERS, holder, HolderRow(digest))

    def unpin(self, txn: Txn, holder: str) -> None:
        txn.delete(HOLDERS, holder)


class FakeTemplates:
    """Empty disks without a formatter."""

    def __init__(self, bomb: Bomb) -> None:
        self._bomb = bomb

    async def make(self, path: Path, size: int, *, uid: int = 0) -> None:
        self._bomb.tick("before disk")
        path.write_bytes(b"empty")
        await trio.lowlevel.checkpoint()
        self._bomb.tick("after disk")


class FakeGuest:
    """An agent that is ready immediately, does what is requested, and reports how its program ended."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._send, self.events = trio.open_memory_channel[GuestEvent](16)
        self.identity: dict[str, Any] = {}
        self.mounted: set[str] = set()
        self.onlined = 0
        """How often plugged-in memory was brought online."""
        self.busy: set[str] = set()
        self.shutdowns = 0
        self.graces: list[float | None] = []
        """Of the shutdowns."""
        self.hung_up = trio.Event()
        """Set: its channel has ended, and it dials again."""
        self.silent_since: datetime | None = None
        self.silence_changed: Callable[[], object] = lambda: None
        self.held = False
        self.restored = False
        self.stuck: set[str] = set()
        """Names of the methods that are not answered."""
        self.limits: Mapping[Op, float] = LIMITS
        """Seconds after which they fail, as those of the real client do."""
        self.asked = trio.Event()
        """Set when such a method is called."""

    def hold(self, held: bool) -> None:
        self.held = held

    async def _obey(self, op: Op) -> None:
        """Raises GuestTimeout at its limit, if the guest is stuck here, and GuestLost once it is off."""
        await trio.lowlevel.checkpoint()
        if self._process.ended.is_set():
            raise GuestLost("the connection to the guest has ended")
        if op.name.lower() in self.stuck:
            self.asked.set()
            await trio.sleep(self.limits[op])
            raise GuestTimeout(f"the guest did not finish {op.name.lower()} within {self.limits[op]:g} s")

    @property
    def frozen(self) -> bool:
        """Of the workload: kept in the guest's memory, so a new connection and a capture do not lose it."""
        frozen: bool = self._process.memory.frozen
        return frozen

    async def run(self) -> None:
        try:
            self._send.send_nowait(Ready({"kernel": 1}))
            self._send.send_nowait(Started())
            async with trio.open_nursery() as nursery:
                for end in (self._process.ended, self.hung_up):
                    nursery.start_soon(self._cancel_after, end, nursery.cancel_scope)
        finally:
            self._send.close()

    @staticmethod
    async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
        await event.wait()
        scope.cancel()

    def tell(self, event: GuestEvent) -> None:
        self._send.send_nowait(event)

    async def shutdown(self, *, grace_seconds: float | None = None, signal: int = 0) -> None:
        self.shutdowns += 1
        self.graces.append(grace_seconds)
        await self._obey(Op.SHUTDOWN)
        self.tell(Exited(143, 15))
        await trio.lowlevel.checkpoint()
        self._process.end(ExitReason.POWEROFF)

    async def ping(self) -> None:
        await self._obey(Op.PING)

    async def freeze(self) -> None:
        await self._obey(Op.FREEZE)
        self._process.memory.frozen = True

    async def thaw(self) -> None:
        await self._obey(Op.THAW)
        self._process.memory.frozen = False

    async def set_identity(self, **identity: Any) -> None:
        await self._obey(Op.IDENTITY)
        self.identity = identity

    async def warm(self) -> None:
        await self._obey(Op.WARM)

    async def stat(self, path: str, *, follow_links: bool) -> PathInfo:
        """Stuck, it ends with the connection."""
        if "stat" in self.stuck:
            self.asked.set()
            async with trio.open_nursery() as nursery:
                for end in (self._process.ended, self.hung_up):
                    nursery.start_soon(self._cancel_after, end, nursery.cancel_scope)
            raise GuestLost("the connection to the guest has ended")
        await self._obey(Op.STAT)
        return PathInfo(exists=True)

    async def mount_volume(self, volume: Any) -> None:
        await self._obey(Op.MOUNT)
        self.mounted.add(volume.path)

    async def online_memory(self) -> int:
        await self._obey(Op.MEMORY)
        self.onlined += 1
        return 0

    async def unmount_volume(self, path: str) -> None:
        await self._obey(Op.UNMOUNT)
        if path in self.busy:
            raise InUse(f"{path} is in use by 7 (cat)")
        self.mounted.discard(path)


class Lab:
    """See above. ``machine`` and the parts outlive servers."""

    def __init__(self, store: Store, paths: Paths) -> None:
        self.store = store
        self.paths = paths
        self.bomb = Bomb()
        self.machine = FakeMachine()
        self.network = FakeNetwork(self.bomb)
        self.devices = FakeDevices(self.bomb)
        self.egress = FakeEgress(store, self.bomb)
        self.limits = Limits()
        self.images = FakeImages(paths.images / "disk", self.bomb)
        self.guests: dict[str, FakeGuest] = {}
        self.states: dict[str, InstanceState | None] = {}
        self.impossible: list[str] = []
        """Changes of state that the table of transitions does not have."""
        self.boot_id = "boot"
        self.now: Callable[[], datetime] = utc_now
        self.driver = FakeDriver(self.machine)
        paths.run_dir.mkdir(parents=True, exist_ok=True)
        paths.tmp.mkdir(parents=True, exist_ok=True)

    # Faults

    def fail_at(self, number: int) -> None:
        self.bomb.count, self.bomb.fail_at, self.bomb.crash_at = 0, number, None

    def crash_at(self, number: int) -> None:
        self.bomb.count, self.bomb.fail_at, self.bomb.crash_at = 0, None, number

    def end_at(self, number: int) -> None:
        self.bomb.count, self.bomb.fail_at, self.bomb.crash_at, self.bomb.end_at = 0, None, None, number

    def disarm(self) -> None:
        self.bomb.fail_at = self.bomb.crash_at = self.bomb.end_at = None
        self.bomb.dead = False

    # Servers

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Instances]:
        """A server. It ends with the block; after a crash, silently."""
        self.disarm()
        instances = self._build()
        recorded = self.store.read(leases.all_leases)
        self.leases.held = {lease.instance_id: lease.ports for lease in recorded if lease.ports}
        await self.network.start(recorded)
        with trio.CancelScope() as scope:
            try:
                async with trio.open_nursery() as nursery:
                    self.bomb.end = nursery.cancel_scope.cancel
                    await nursery.start(instances.machine.captures.compressor.run)  # type: ignore[attr-defined]
                    await nursery.start(instances.run)
                    yield instances
                    nursery.cancel_scope.cancel()
                    assert not self.impossible, ", ".join(self.impossible)
            except* Crash:
                scope.cancel()

    def snapshots(self, instances: Instances) -> Snapshots:
        return Snapshots(
            store=self.store,
            tasks=instances.tasks,
            ledger=instances.ledger,
            forks=instances.forks,
            pools=instances.pools,
            machine=instances.machine,
            catalog=self.catalog,
            settings=self.config.snapshots,
            render=instances.view,
            now=self.now,
        )

    def _build(self) -> Instances:
        self.config = config = Config(data_dir=str(self.paths.data_dir), run_dir=str(self.paths.run_dir))
        driver = FakeDriver(self.machine)
        driver.guest = self._open_guest
        driver.faults = self.driver.faults
        self.driver = driver
        _count_effects(driver, ("launch", "restore", "kill_stray"), self.bomb, "driver")
        store = _Mortal(self.store, self.bomb)
        self.leases = FakeLeases(store, self.network, self.bomb)
        self.catalog = catalog = Catalog((driver,), store=store, default="qemu", depends_on={})  # type: ignore[arg-type]
        catalog._probed.set()
        files = Files()
        effects = ("remove", "copy", "copy_all", "move_all", "publish", "write", "make_dir")
        _count_effects(files, effects, self.bomb, "files")
        machine = Machine(
            config=config,
            store=store,  # type: ignore[arg-type]
            files=files,
            drivers={HypervisorKind.QEMU: driver},
            cgroups=CGroups(None),
            kernel="/kernel",
            initrd=None,
            images=self.images,
            network=self.network,
            devices=self.devices,
            egress=self.egress,
            templates=FakeTemplates(self.bomb),
            compressor=Compressor(store, self.paths),  # type: ignore[arg-type]
            boot_id=self.boot_id,
            connect=self._connect,  # type: ignore[arg-type]
        )
        instances = Instances(
            config=config,
            store=store,  # type: ignore[arg-type]
            machine=machine,
            images=self.images,
            leases=self.leases,
            devices=self.devices,
            secrets=self.egress,
            counters=_NoCounters(),
            limits=lambda: self.limits,
            catalog=catalog,
            now=self.now,
        )
        post, remove = instances.board.post, instances.board.remove
        instances.board.post = lambda record: post(self._seen(record, record.state))  # type: ignore[method-assign]
        instances.board.remove = lambda record: remove(self._seen(record, None))  # type: ignore[method-assign]
        instances.tasks.shared.changed = instances.board.post
        return instances

    def _seen(self, record: InstanceRecord, state: InstanceState | None) -> InstanceRecord:
        before = self.states.get(record.id)
        if not is_possible(before, state):
            self.impossible.append(f"{before or 'new'} to {state or 'gone'}")
        self.states[record.id] = state
        return record

    def _open_guest(self, vmm: FakeVmm, stream: Any) -> None:
        self._opening = vmm
        _count_effects(vmm, ("pause", "resume", "capture", "add_disk", "remove_disk", "set_link"), self.bomb, "vmm")

    def _connect(self, stream: Any, nonce: bytes) -> FakeGuest:
        guest = FakeGuest(self._opening.process)
        self.guests[self._opening.config.instance_id] = guest
        return guest

    # Looking

    def world_as_text(self) -> str:
        """What exists outside of the store, one thing a line."""
        lines = [f"vmm {p.config.instance_id} {p.state.value}" for p in self.machine.alive()]
        for part in (self.network.taps, self.network.held, self.devices.bound, self.egress.policies):
            lines += [f"{part.kind} {name} {value}" for name, value in part.there.items()]
        for folder in ("instances", "snapshots", "captures", "tmp"):
            root = self.paths.data_dir / folder
            lines += [
                f"{folder} {path.relative_to(root)}"
                for path in sorted(root.rglob("*"))
                if path.suffix not in (".log", SUFFIX) and path.name != "logs"
            ]
        lines += [f"run {path.name}" for path in self.paths.vms.glob("*")]
        return "\n".join(sorted(lines))


class _NoCounters:
    def of_all(self) -> dict[str, tuple[int, int]]:
        return {}

    def of_instance(self, instance_id: str) -> tuple[int, int]:
        return 0, 0


class _Mortal:
    """A store whose writes are moments for a crash: before, so that they never happened, and after."""

    def __init__(self, store: Store, bomb: Bomb) -> None:
        self._store = store
        self._bomb = bomb

    def read(self, fn: Callable[[Txn], Any]) -> Any:
        return self._store.read(fn)

    async def write(self, fn: Callable[[Txn], Any]) -> Any:
        if self._bomb.dead or self._bomb.crash_at is not None or self._bomb.end_at is not None:
            self._bomb.tick("before a write")
        result = await self._store.write(fn)
        if self._bomb.dead or self._bomb.crash_at is not None or self._bomb.end_at is not None:
            self._bomb.tick("after a write")
        return result


def _count_effects(thing: Any, names: tuple[str, ...], bomb: Bomb, kind: str) -> None:
    for name in names:
        method = getattr(thing, name)
        assert inspect.iscoroutinefunction(method), name
        setattr(thing, name, _counted(method, f"{kind} {name}", bomb))


def _counted(method: Callable[..., Any], name: str, bomb: Bomb) -> Callable[..., Any]:
    @wraps(method)
    async def counted(*args: Any, **kwargs: Any) -> Any:
        bomb.tick(f"before {name}")
        result = await method(*args, **kwargs)
        bomb.tick(f"after {name}")
        return result

    return counted


def request(name: str, **changes: Any) -> CreateInstanceRequest:
    usual = {"image": "busybox", "size": "64MB", "overlay_size": "16MB"}
    return CreateInstanceRequest(**{"name": name, **usual, **changes})
