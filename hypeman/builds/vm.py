"""Builds in VMs: implements ``Worker``.

Each attempt has an instance of its own, made of the builder image and driven through the guest's agent; nothing of
BuildKit runs on the host. The result is carried out through the agent, too, and stored in this server's registry: the
VM needs no route to the API, and there is no token that could be stolen in it.

    instance boots ─► context unpacked ─► steps run ─► layout stored ─► tagged ─► image ready ─► instance deleted

The instance, and the volume of a build without a builder, are named ``build-<id>`` and have a tag; so the next server
finds what a killed one left. A builder's cache is the volume ``builder-<id>``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import trio

from hypeman.builds import command, dockerfile
from hypeman.builds.layouts import GuestFiles, Layout, RegistryNeeds, write_guest_bytes
from hypeman.builds.progress import LineSplitter, SolveStatus, VertexLog, parse_status
from hypeman.builds.types import Builder, BuildProvenance
from hypeman.builds.work import BuildFailed, Job, Report, Result
from hypeman.errors import AlreadyExists, Conflict, HypemanError, InsufficientResources, NotFound
from hypeman.guest.programs import ExecResult, ExecSession, Output
from hypeman.guest.session_types import ExecRequest
from hypeman.host.files import read_pieces
from hypeman.images.reference import Reference, host_platform, parse_reference
from hypeman.images.types import Image, ImageStatus, ReadyImage
from hypeman.instances.model.types import (
    CreateInstanceRequest,
    Instance,
    InstanceState,
    NetworkRequest,
    VolumeMount,
    WaitForStateResponse,
)
from hypeman.logins import DEFAULT_REGISTRY
from hypeman.text import one_line
from hypeman.volumes.types import CreateVolumeRequest, Volume

log = logging.getLogger(__name__)

BUILD_TAG = "hypeman.build"
BUILDER_TAG = "hypeman.builder"
_AGENT_SECONDS = 120
_SHORT_SECONDS = 120
"""For programs that only prepare something."""
_RESOURCES_RETRY = 5.0
_CACHE_RETRY = 0.5
_CACHE_SECONDS = 60.0
"""For the VM of the builder's last build to release the cache."""
_BOOT_SECONDS = 150.0
_BOOTS = 2
"""A guest without KVM on a busy host may hang while it boots, when an interrupt of a timer is lost."""
_STOP_SECONDS = 30.0
_SYNC_SECONDS = 30.0
"""Together less than a service manager gives a server that stops, whose builds are cancelled."""
_MAX_REPAIRS = 20
_MAX_TAIL = 8 << 10
_MAX_BASES = 100
_MAX_OUTPUT = 1 << 20
_HIDDEN = b"***"
_NOISE = b'level=warning msg="failed check for fsverity support"'
"""What buildctl says on file systems without it, and needs none."""
_REASON = b"error: "
"""How buildctl begins the reason of a failure."""
_BASE = re.compile(r"FROM \S+@(sha256:[0-9a-f]{64})")
_HASH = re.compile(r"([0-9a-f]{64})  (\S+)")
_LEFT = re.compile(
    rf'(?:[a-z ]+: )*failed to prepare [^"]*: failed to rename: rename ({command.STATE}/[\w/-]+/snapshots)/new-\d+ '
    r"\1/(\d+): (?:file exists|directory not empty)"
)
"""How BuildKit fails on a snapshot that it has not recorded: it was killed between making and recording it. The whole
message, since what a Dockerfile says is quoted in others."""
_T = TypeVar("_T")


class Guests(GuestFiles, Protocol):
    async def list(self, state: InstanceState | None, tags: Mapping[str, str]) -> bytes: ...
    async def create(self, request: CreateInstanceRequest) -> Instance: ...
    async def wait_state(self, ref: str, state: InstanceState, timeout: float) -> WaitForStateResponse: ...
    async def exec(self, ref: str, request: ExecRequest) -> ExecSession: ...
    async def delete(self, ref: str, *, graceful: bool = True) -> None: ...


class VolumeNeeds(Protocol):
    async def list(self, *, tags: Mapping[str, str]) -> Sequence[Volume]: ...
    async def create(self, request: CreateVolumeRequest) -> Volume: ...
    async def delete(self, ref: str) -> None: ...


class ImageNeeds(Protocol):
    def find_ready(self, name: str, platform: str | None = None) -> ReadyImage | None: ...
    async def wait_final(self, name: str) -> Image: ...
    async def wait_ready(self, name: str, platform: str | None = None) -> ReadyImage: ...


class VmSettings(msgspec.Struct, frozen=True):
    image: str
    disk_size_gb: int = 10
    insecure_registries: tuple[str, ...] = ()
    mirrors: dict[str, tuple[str, ...]] = {}
    ca_file: str = ""


class _Listed(msgspec.Struct, frozen=True):
    id: str
    name: str
    tags: dict[str, str] = {}


class VmWorker:
    def __init__(
        self, *, guests: Guests, volumes: VolumeNeeds, images: ImageNeeds, registry: RegistryNeeds, settings: VmSettings
    ) -> None:
        self._guests = guests
        self._volumes = volumes
        self._images = images
        self._registry = registry
        self._settings = settings

    async def build(self, job: Job, report: Report) -> Result:
        await self.clean(job.build_id)
        instance = await self._boot(job, report)
        await report.vm(instance.id)
        attempt = _Attempt(self._guests, self._registry, self._images, self._settings, job, report, instance.id)
        return await attempt.run()

    async def clean(self, build_id: str) -> None:
        name = _name(build_id)
        lent = [volume for volume in await self._volumes.list(tags={BUILD_TAG: build_id}) if volume.id == name]
        with suppress(NotFound):
            await self._guests.delete(name, graceful=not lent)  # a builder's cache is unmounted first
        for volume in lent:
            with suppress(NotFound):
                await self._volumes.delete(volume.id)

    async def clean_all(self, builders: Collection[str]) -> None:
        found = msgspec.json.decode(await self._guests.list(None, {}), type=list[_Listed])
        left = {each.tags[BUILD_TAG] for each in found if each.name == _name(each.tags.get(BUILD_TAG, ""))}
        volumes = await self._volumes.list(tags={})
        for volume in volumes:
            tags = volume.tags or {}
            if volume.id == _name(tags.get(BUILD_TAG, "")):
                left.add(tags[BUILD_TAG])
        for build_id in sorted(left):
            await self.clean(build_id)
        for volume in volumes:
            tags = volume.tags or {}
            builder_id = tags.get(BUILDER_TAG, "")
            if volume.id == _cache(builder_id) and builder_id not in builders:
                await self.remove_cache(builder_id)

    async def make_cache(self, builder: Builder) -> None:
        request = CreateVolumeRequest(
            name=f"cache of builder {builder.id}",
            size_gb=builder.disk_size_gb,
            id=_cache(builder.id),
            tags={BUILDER_TAG: builder.id},
        )
        with suppress(AlreadyExists):
            await self._volumes.create(request)

    async def remove_cache(self, builder_id: str) -> None:
        with suppress(NotFound):
            await self._volumes.delete(_cache(builder_id))

    async def _pull(self, report: Report) -> None:
        """Have the builder image here: a pull takes longer than a boot may, and fails for other reasons. Raises
        BuildFailed."""
        name = self._settings.image
        if self._images.find_ready(name) is not None:
            return
        report.log(f"pulling the builder image {name} (build.image)")
        try:
            await self._images.wait_ready(name)
        except HypemanError as error:
            raise BuildFailed(
                f"the builder image {name} (build.image) cannot be used: {error.message}; on a host without access to "
                "its registry, import one with `hypeman image import` and name it as build.image"
            ) from None

    async def _boot(self, job: Job, report: Report) -> Instance:
        """A running instance. Waits while the host is full."""
        await self._pull(report)
        if job.builder is not None:
            await self.make_cache(job.builder)  # it is created again if someone deleted it
            volume = _cache(job.builder.id)
        else:
            volume = _name(job.build_id)
            tags = {BUILD_TAG: job.build_id}
            request = CreateVolumeRequest(name=volume, size_gb=self._settings.disk_size_gb, id=volume, tags=tags)
            await self._retried(report, partial(self._volumes.create, request))
        create = CreateInstanceRequest(
            name=_name(job.build_id),
            image=self._settings.image,
            size=f"{job.spec.memory_mb}MB",
            vcpus=job.spec.cpus,
            overlay_size=f"{self._settings.disk_size_gb}GB",
            network=NetworkRequest(enabled=not job.spec.isolated),
            volumes=(VolumeMount(volume_id=volume, mount_path=command.STATE),),
            idle=True,
            user="0:0",
            tags={BUILD_TAG: job.build_id},
        )
        report.log(f"booting a VM with {job.spec.cpus} CPUs and {job.spec.memory_mb} MB")
        for _ in range(_BOOTS):
            instance = await self._retried(report, partial(self._guests.create, create))
            reached = await self._guests.wait_state(instance.id, InstanceState.RUNNING, _BOOT_SECONDS)
            if reached.state is InstanceState.RUNNING:
                return instance
            if reached.state is not InstanceState.INITIALIZING:
                break
            report.log(f"the VM did not start within {_BOOT_SECONDS:.0f} s")
            await self._guests.delete(instance.id, graceful=False)
        raise BuildFailed(f"the VM did not start: {reached.state_error or reached.state.value}")

    async def _retried(self, report: Report, attempt: Callable[[], Awaitable[_T]]) -> _T:
        reported = False
        began = trio.current_time()
        while True:
            try:
                return await attempt()
            except InsufficientResources as error:
                retry, reason = _RESOURCES_RETRY, f"waiting until the host has room: {error.message}"
            except Conflict as error:
                if isinstance(error, AlreadyExists) or trio.current_time() - began > _CACHE_SECONDS:
                    raise
                retry, reason = _CACHE_RETRY, f"waiting for the builder's cache: {error.message}"
            if not reported:
                report.log(reason)
                reported = True
            await trio.sleep(retry)


class _Attempt:
    """One attempt, in a running instance."""

    def __init__(
        self,
        guests: Guests,
        registry: RegistryNeeds,
        images: ImageNeeds,
        settings: VmSettings,
        job: Job,
        report: Report,
        ref: str,
    ) -> None:
        self._guests = guests
        self._registry = registry
        self._images = images
        self._settings = settings
        self._job = job
        self._report = report
        self._ref = ref
        self._redact = Redactor((*job.secrets.values(), *job.borrowed.ssh.values()))
        self._bases: list[str] = []
        self._errors: list[str] = []
        self._tail = bytearray()
        """The last lines that are no progress: the reason of a failure."""

    async def run(self) -> Result:
        await self._prepare()
        spec = self._job.spec
        lockfiles = dict[str, str]()
        for line in (await self._run(("sh", "-c", command.HASH_LOCKFILES))).decode(errors="replace").splitlines():
            if (found := _HASH.fullmatch(line)) is not None and found[2] in command.LOCKFILES:
                lockfiles[found[2]] = f"sha256:{found[1]}"
        version = (await self._run(("buildkitd", "--version"))).decode(errors="replace").split()
        caches = await self._load_caches()
        exports = [f"{command.CACHE_OUT}/{place}" for place in range(len(self._export_to()))]
        images = await self._load_images()
        argv = command.build_command(spec, cache_in=caches, cache_out=exports, images=images)
        await self._with_daemon(partial(self._solve, argv))
        if spec.base_image_digest and spec.base_image_digest not in self._bases:
            raise BuildFailed(f"no base image has the digest {spec.base_image_digest} (base_image_digest)")
        provenance = BuildProvenance(
            base_image_digest=self._bases[-1] if self._bases else "",
            source_hash=self._job.source_hash,
            lockfile_hashes=lockfiles,
            buildkit_version=one_line(version[2])[:100] if len(version) > 2 else "",
            timestamp=datetime.now(UTC),
        )
        return await self._store(provenance)

    # ── Preparing ────────────────────────────────────────────────────────────────────────────────

    async def _prepare(self) -> None:
        job = self._job
        await self._run(("sh", "-c", command.PREPARE))
        await self._unpack()
        if job.spec.dockerfile:
            data = await trio.to_thread.run_sync(job.dockerfile.read_bytes)
            await self._put(f"{command.DOCKERFILE}/Dockerfile", data)
        config = command.render_config(
            self._settings.insecure_registries, self._settings.mirrors, self._settings.disk_size_gb << 29
        )
        await self._put(command.CONFIG, config.encode())
        for name, value in job.secrets.items():
            await self._put(f"{command.SECRETS}/{name}", value)
        for name, value in job.borrowed.ssh.items():
            await self._put(f"{command.SSH}/{name}", value)
        await self._put(f"{command.DOCKER}/config.json", job.borrowed.registry_auth or b"{}")
        if self._settings.ca_file:
            data = await trio.to_thread.run_sync(Path(self._settings.ca_file).read_bytes)
            await self._put(command.CA_FILE, data)

    async def _put(self, path: str, data: bytes) -> None:
        await write_guest_bytes(self._guests, self._ref, path, data)

    async def _unpack(self) -> None:
        """The context is unpacked where it is used: a hostile archive meets nothing but its own VM."""
        self._report.log("sending the context")
        fd = await trio.to_thread.run_sync(os.open, self._job.source, os.O_RDONLY | os.O_CLOEXEC)
        async with await self._exec(command.UNPACK, 0) as session:

            async def feed() -> None:
                try:
                    async with aclosing(read_pieces(fd, 0, os.fstat(fd).st_size)) as pieces:
                        async for piece in pieces:
                            await session.send_stdin(piece)
                    await session.close_stdin()
                except HypemanError:
                    pass  # its reason is that of the program's end

            async with trio.open_nursery() as nursery:
                nursery.start_soon(feed)
                output = bytearray()
                while isinstance(received := await session.receive(), Output):
                    output += received.data[: _MAX_TAIL - len(output)]
                nursery.cancel_scope.cancel()
        if received.exit_code:
            raise BuildFailed(f"the context cannot be unpacked: {_text(output) or received.message}")

    def _layout(self, directory: str) -> Layout:
        return Layout(self._guests, self._registry, self._ref, directory)

    async def _load_images(self) -> list[command.LocalImage]:
        """Base images that this host has: used as they are, as docker build does, unless newer ones are wanted."""
        spec = self._job.spec
        if spec.pull or (spec.platform and spec.platform != str(host_platform())):
            return []
        if spec.dockerfile:
            data = await trio.to_thread.run_sync(self._job.dockerfile.read_bytes)
        else:
            shown = f'head -c {dockerfile.MAX_BYTES} "$0" 2>/dev/null || true'
            data = await self._run(("sh", "-c", shown, f"{command.CONTEXT}/{spec.dockerfile_path}"))
        loaded = list[command.LocalImage]()
        for image in dockerfile.find_images(data.decode(errors="replace"), spec.build_args):
            if self._images.find_ready(str(image)) is None:
                continue
            directory = f"{command.IMAGES}/{len(loaded)}"
            digest = await self._layout(directory).load(repository_of(image), image.tag)
            if digest is not None:
                self._report.log(f"using {image} of this host")
                loaded.append(command.LocalImage(dockerfile.familiar_name(image), directory, digest))
        return loaded

    async def _load_caches(self) -> list[str]:
        """Directories with the caches of the registry that the build may use."""
        loaded = []
        for place, repository in enumerate(self._import_from()):
            directory = f"{command.CACHE_IN}/{place}"
            if await self._layout(directory).load(repository, "latest") is not None:
                loaded.append(directory)
        return loaded

    def _import_from(self) -> list[str]:
        spec = self._job.spec
        scoped = [f"cache/{spec.cache_scope}"] if spec.cache_scope else []
        return scoped + ([f"cache/global/{spec.global_cache_key}"] if spec.global_cache_key else [])

    def _export_to(self) -> list[str]:
        spec = self._job.spec
        return [one for one in self._import_from() if spec.admin or not one.startswith("cache/global/")]

    # ── Building ─────────────────────────────────────────────────────────────────────────────────

    async def _with_daemon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do ``work`` while BuildKit's daemon runs, and end it so that its state is complete on the disk."""
        environment = {"SSL_CERT_FILE": command.CA_FILE} if self._settings.ca_file else {}
        failure: Exception | None = None
        async with await self._exec(command.daemon_command(), 0, environment) as daemon:
            tail = bytearray()
            ended = trio.Event()
            working = trio.CancelScope()
            watching = trio.CancelScope(shield=True)  # it ends after the work, also after one that is cancelled

            async def watch() -> None:
                with watching:
                    try:
                        while isinstance(received := await daemon.receive(), Output):
                            tail.extend(received.data)
                            del tail[:-_MAX_TAIL]
                        if received.message:
                            tail.extend(received.message.encode())
                    except HypemanError as error:
                        tail.extend(error.message.encode())
                    ended.set()
                    working.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                try:
                    with working:
                        await work()
                except (BuildFailed, HypemanError, OSError) as error:
                    failure = error
                finally:
                    await self._stop(daemon, ended)
                    watching.cancel()
                    await self._sync()
            if working.cancelled_caught:
                failure = BuildFailed(f"BuildKit ended: {self._redact.text(_text(tail))}")
        if failure is not None:
            raise failure

    async def _stop(self, daemon: ExecSession, ended: trio.Event) -> None:
        """Also of a cancelled build: a daemon that is killed may leave its cache inconsistent."""
        with trio.move_on_after(_STOP_SECONDS, shield=True), suppress(HypemanError):
            await daemon.signal(15)
            await ended.wait()

    async def _sync(self) -> None:
        """Also after a failure: the daemon has recorded layers whose files are not on the disk yet, and a VM on a busy
        host may be ended before it has unmounted it."""
        with trio.move_on_after(_SYNC_SECONDS, shield=True), suppress(BuildFailed, HypemanError):
            await self._run(("sync",))

    async def _solve(self, argv: tuple[str, ...]) -> None:
        """Run the build. Snapshots that a killed daemon has left in the cache are removed when they are in the way.
        Raises BuildFailed."""
        for _ in range(_MAX_REPAIRS):
            try:
                await self._steps(argv)
                return
            except BuildFailed as failure:
                left = _LEFT.fullmatch(str(failure))
                if left is None:
                    raise
            self._report.log("removing what a build that was interrupted has left in the cache")
            await self._run(("rm", "-rf", f"{left[1]}/{left[2]}"))
        raise BuildFailed("the builder's cache is damaged; prune it")

    async def _steps(self, argv: tuple[str, ...]) -> None:
        """Run the build, reporting its progress. Raises BuildFailed with its reason."""
        self._errors.clear()
        self._tail.clear()
        splitter = LineSplitter()
        async with await self._exec(argv, 0, {"DOCKER_CONFIG": command.DOCKER}) as session:
            while isinstance(received := await session.receive(), Output):
                for line in splitter.feed(received.data):
                    self._line(line)
        if rest := splitter.flush():
            self._line(rest)
        if received.exit_code:
            said = [line[7:] for line in _text(self._tail).splitlines() if line.startswith(_REASON.decode())]
            reason = self._errors[-1] if self._errors else ""
            raise BuildFailed(said[-1] if said else reason or received.message or f"exit code {received.exit_code}")

    def _line(self, line: bytes) -> None:
        status = parse_status(line)
        if status is None:
            if text := line.rstrip():
                text = self._redact.bytes(text)
                if not text.startswith(_REASON) and _NOISE not in text:  # the reason becomes that of the build
                    self._report.log(text.decode(errors="replace"))
                self._tail += text + b"\n"
                del self._tail[:-_MAX_TAIL]
            return
        status = self._redact.status(status)
        for vertex in status.vertexes:
            found = _BASE.search(vertex.name)
            if found is not None and found[1] not in self._bases and len(self._bases) < _MAX_BASES:
                self._bases.append(found[1])
            if vertex.error:
                self._errors = [*self._errors[-9:], vertex.error]
        self._report.progress(msgspec.json.encode(status))

    # ── Storing ──────────────────────────────────────────────────────────────────────────────────

    async def _store(self, provenance: BuildProvenance) -> Result:
        await self._report.pushing()
        for place, repository in enumerate(self._export_to()):
            cache = self._layout(f"{command.CACHE_OUT}/{place}")
            await cache.tag(repository, "latest", await cache.store(repository))
        layout = self._layout(command.OUT)
        names = [parse_reference(name) for name in self._job.images]
        roots = [(name, await layout.store(repository_of(name))) for name in names]
        self._report.publishing()
        with trio.CancelScope(shield=True):  # short: all of it is here
            for name, root in roots:
                await layout.tag(repository_of(name), name.tag, root)
        name, root = roots[0]
        try:
            image = await self._images.wait_final(str(name))
        except NotFound:
            self._report.log(f"{name} is stored in the registry; it is not an image for this host's platform")
            return Result(root.digest, str(name), provenance)
        if image.status is not ImageStatus.READY:
            raise BuildFailed(f"the image cannot be used: {image.error or image.status.value}")
        return Result(image.digest, str(name), provenance)

    # ── Programs ─────────────────────────────────────────────────────────────────────────────────

    async def _exec(
        self, argv: Sequence[str], seconds: int, environment: Mapping[str, str] | None = None
    ) -> ExecSession:
        request = ExecRequest(
            command=tuple(argv),
            env=dict(environment or {}),
            user="0:0",
            cwd="/",
            timeout=seconds,
            wait_for_agent=_AGENT_SECONDS,
        )
        return await self._guests.exec(self._ref, request)

    async def _run(self, argv: Sequence[str]) -> bytes:
        """Output of a short program. Raises BuildFailed."""
        output, errors = bytearray(), bytearray()
        async with await self._exec(argv, _SHORT_SECONDS) as session:
            while isinstance(received := await session.receive(), Output):
                kept = errors if received.stderr else output
                kept += received.data[: max(0, _MAX_OUTPUT - len(kept))]
        assert isinstance(received, ExecResult)
        if received.exit_code:
            said = _text(errors) or received.message or f"exit code {received.exit_code}"
            raise BuildFailed(f"{argv[0]} failed in the VM: {said}")
        return bytes(output)


class Redactor:
    """Hides secrets in what a build prints. BuildKit prints none itself; a step may. What a step splits or encodes is
    not recognised."""

    def __init__(self, values: Sequence[bytes]) -> None:
        lines = {line.strip() for value in values for line in (value, *value.splitlines())}
        self._values = sorted((line for line in lines if len(line) >= 4), key=len, reverse=True)

    def bytes(self, data: bytes) -> bytes:
        for value in self._values:
            data = data.replace(value, _HIDDEN)
        return data

    def text(self, text: str) -> str:
        return self.bytes(text.encode()).decode(errors="replace") if self._values else text

    def status(self, status: SolveStatus) -> SolveStatus:
        if not self._values:
            return status
        replace = msgspec.structs.replace
        return replace(
            status,
            vertexes=tuple(replace(v, name=self.text(v.name), error=self.text(v.error)) for v in status.vertexes),
            logs=tuple(self._log(entry) for entry in status.logs),
            warnings=tuple(replace(w, short=self.bytes(w.short)) for w in status.warnings),
        )

    def _log(self, entry: VertexLog) -> VertexLog:
        return msgspec.structs.replace(entry, data=self.bytes(entry.data))


def repository_of(name: Reference) -> str:
    """The repository of this server's registry in which an image of that name lies."""
    return name.repository if name.registry == DEFAULT_REGISTRY else f"{name.registry}/{name.repository}"


def _name(build_id: str) -> str:
    return f"build-{build_id}"


def _cache(builder_id: str) -> str:
    return f"builder-{builder_id}"


def _text(data: bytearray) -> str:
    return bytes(data).decode(errors="replace").strip()
