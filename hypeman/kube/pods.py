"""Carries out the decisions about pods (``decide.py``): one task per pod, which looks, acts, reports, and looks again.

    pods of this node ──┐                                         ┌─→ this host's server
                        ├─→ Worker.step: decide → perform → report ┤
    its instances ──────┘                                         └─→ the pod's status, events

A step may fail at any await, and the program may be killed there: the next step finds what the last one left. What a
worker keeps in memory (pauses, counters of a probe, whether an image was requested) only saves work.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import msgspec
import trio

from hypeman.images.types import Image, ImageStatus
from hypeman.instances.model.types import (
    CreateInstanceRequest,
    ForkInstanceRequest,
    Instance,
    InstanceState,
    TargetState,
    UpdateInstanceRequest,
)
from hypeman.kube import materials, names
from hypeman.kube.api import ApiError, Patch, Refused, pods_path
from hypeman.kube.decide import Action, Known, Owner, Verb, decide, tags_of
from hypeman.kube.events import Events
from hypeman.kube.instances import Instances, change_instance, remove_instance, save_or_stop, stop_instance
from hypeman.kube.lease import LeaseClock
from hypeman.kube.local import LocalError, LocalRefused
from hypeman.kube.owners import Owners
from hypeman.kube.podspec import PodSpec, Refusal, notes_of, parse_pod, read_pod
from hypeman.kube.probes import Probing, passes
from hypeman.kube.references import Missing, needed
from hypeman.kube.reflector import Reflector
from hypeman.kube.site import Served, Site
from hypeman.kube.status import NO_EPHEMERAL, Doing, Failure, Seen, derive_status, differs, was_started
from hypeman.kube.translate import (
    Wanted,
    check_annotations,
    check_golden,
    credentials_of,
    credentials_secret,
    facts_of,
    golden_digest,
    golden_request,
    spec_digest,
    translate,
    unknown_annotations,
)
from hypeman.kube.translate import tags_of as wanted_tags
from hypeman.kube.types import Pod, PodStatus

log = logging.getLogger(__name__)

T = TypeVar("T")

RESYNC_SECONDS = 30.0
POLL_SECONDS = 0.2
"""Between looks at an image that is pulled, or an instance that boots."""
REFUSAL_SECONDS = 5.0
"""How long a refused pod waits before it fails: its controller makes the next one at once."""
MAX_REPETITION = 10.0
MAX_PAUSE = 300.0
IMAGE_PAUSE = 10.0
"""Seconds before an image is pulled again; doubles up to ``MAX_PAUSE``, as in the kubelet."""
RESTART_PAUSE = 10.0
"""Seconds before a program that failed to start is started again; doubles likewise."""
NO_ROOM_SECONDS = 60.0
"""How long a pod waits for resources that the host should have: its predecessor may still be ending."""
MAX_STARTS = 8
"""Instances that are made or restored at a time."""
CREATE_SECONDS = 120.0
CHANGING = (names.OWNER, names.OWNER_UID, names.FENCING, names.TOLERATES)
"""Tags that follow the pod."""


class Shared:
    """What all workers use."""

    def __init__(self, site: Site, lease: LeaseClock, events: Events, owners: Owners) -> None:
        self.site = site
        self.lease = lease
        self.events = events
        self.owners = owners
        self.pods: Reflector[Pod] = Reflector(
            site.api, "/api/v1/pods", Pod, self._pod_changed, fieldSelector=f"spec.nodeName={site.name}"
        )
        self.instances = Instances(site.local, site.name, self._instances_changed)
        self.starts = trio.CapacityLimiter(MAX_STARTS)
        self.golden: dict[str, trio.Lock] = {}
        self.devices: set[str] = set()
        """Chosen for pods whose instances are being made."""
        self.workers: dict[str, Worker] = {}
        self.changed = trio.Event()

    def _pod_changed(self, uid: str) -> None:
        self.changed.set()
        if uid in self.workers:
            self.workers[uid].wake.set()

    def _instances_changed(self, instances: Sequence[Instance]) -> None:
        """Wake whom it concerns: a worker for each change of a hundred instances would be ten thousand steps."""
        self.changed.set()
        for uid in concerned(instances, self.workers, self.instances.index.by_pod):
            self.workers[uid].wake.set()


class Worker:
    """Serves one pod, from when it is seen until its object is gone."""

    def __init__(self, shared: Shared, uid: str) -> None:
        self._shared = shared
        self._uid = uid
        self._site = shared.site
        self._events = shared.events
        self.wake = trio.Event()
        self._doing = Doing()
        self._failure: Failure | None = None
        self._failures = 0
        self._image_failures = 0
        self._retry_image_at = 0.0
        self._image_problem = ""
        self._requested = False
        self._image_id = ""
        self._probing: Probing | None = None
        self._failed_starts = 0
        self._start_at = 0.0
        self._refused_at: float | None = None
        self._noted: set[str] = set()
        self._last: tuple[Verb, InstanceState | None] | None = None
        self._repeated = 0

    async def run(self) -> None:
        while (pod := self._shared.pods.items.get(self._uid)) is not None:
            self.wake = trio.Event()
            try:
                pause = await self._step(pod)
                self._failures = 0
            except (ApiError, LocalError) as error:
                log.warning("pod %s: %s", pod.key, error.message)
                self._failures += 1
                pause = min(0.25 * 2.0 ** min(self._failures, 8), RESYNC_SECONDS)
            except Exception:  # a bug about one pod must not end the others
                log.exception("pod %s", pod.key)
                pause = RESYNC_SECONDS
            with trio.move_on_after(pause):
                await self.wake.wait()

    # ── One step ────────────────────────────────────────────────────────────────────────────────

    @property
    def instance(self) -> Instance | None:
        return self._shared.instances.index.by_pod.get(self._uid)

    async def _step(self, pod: Pod) -> float:
        """Decide and act once. Returns the seconds until the next look, if nothing changes before."""
        try:
            if self.instance is None:
                check_annotations(pod)
            spec = read_pod(pod.spec) if self.instance is not None else parse_pod(pod.spec)
        except Refusal as refusal:
            return await self._refused(pod, refusal)
        self._note(pod)
        action = decide(await self._known(pod, spec))
        if action.verb is Verb.REMOVE:
            await self._report(pod, spec)  # how its program ended is known as long as the instance exists
        try:
            pause = await self._perform(action, pod, spec)
        except Refusal as refusal:
            return await self._refused(pod, refusal)
        if action.verb is Verb.RELEASE:
            return RESYNC_SECONDS
        pause = min(pause, await self._probe(pod, spec))
        if (left := self._start_at - trio.current_time()) > 0:
            pause = min(pause, left)
        pause = max(pause, self._pause_of_repetition(action.verb))
        await self._report(pod, spec)
        if action.verb is Verb.WAIT:
            await self._rotate(pod, spec)
        return pause

    def _pause_of_repetition(self, verb: Verb) -> float:
        """Seconds to wait after an action that was taken before and has changed nothing."""
        now = (verb, self.instance.state if self.instance is not None else None)
        self._repeated = self._repeated + 1 if now == self._last else 0
        self._last = now
        if verb in (Verb.WAIT, Verb.CREATE) or not self._repeated:
            return 0.0
        return min(0.1 * 2.0 ** min(self._repeated, 8), MAX_REPETITION)

    async def _known(self, pod: Pod, spec: PodSpec) -> Known:
        shared, owner = self._shared, pod.metadata.controller
        state, left = Owner.NONE, None
        if owner is not None and names.is_retained(owner):
            if pod.metadata.deletion_timestamp is not None:
                state = await shared.owners.look(owner, pod.metadata.namespace)
            elif self.instance is None:
                left = shared.instances.index.left_by(owner.uid, pod.metadata.namespace, shared.pods.items)
        tags = wanted_tags(pod, spec, self._site.name)
        return Known(
            pod=pod,
            restart_policy=spec.restart_policy,
            tags={key: value for key, value in tags.items() if key in CHANGING},
            spec=tags[names.SPEC],
            instance=self.instance,
            left=left,
            owner=state,
            failed_to_start=self._probing is not None and self._probing.has_failed_to_start,
            held_back=trio.current_time() < self._start_at,
            lease_valid=shared.lease.is_valid,
            deadline=spec.active_deadline_seconds,
            now=datetime.now(UTC),
        )

    async def _refused(self, pod: Pod, refusal: Refusal) -> float:
        """The pod asks for what cannot be done: it fails, and an event names each field."""
        if pod.metadata.deletion_timestamp is not None:
            await self._release(pod)
            return RESYNC_SECONDS
        if pod.status.phase in ("Succeeded", "Failed"):
            return math.inf
        if self._refused_at is None:
            self._refused_at = trio.current_time()
            for remark in refusal.remarks:
                self._events.warn(pod, "Unsupported", str(remark))
        if (left := self._refused_at + REFUSAL_SECONDS - trio.current_time()) > 0:
            return left
        self._failure = Failure("Unsupported", str(refusal))
        await self._report(pod, read_pod({"containers": [{"name": "", "image": ""}], "restartPolicy": "Never"}))
        return math.inf

    def _note(self, pod: Pod) -> None:
        for remark in (*notes_of(pod.spec), *unknown_annotations(pod)):
            if remark.field not in self._noted:
                self._noted.add(remark.field)
                self._events.warn(pod, "NotApplied", str(remark))
        instance = self.instance
        if instance is not None and "spec" not in self._noted:
            made_of = tags_of(instance).get(names.SPEC)
            if made_of and made_of != spec_digest(pod):
                self._noted.add("spec")
                self._events.warn(pod, "NotApplied", "spec.containers[0] has changed: recreate the pod to apply it")
        for each in pod.spec.get("ephemeralContainers") or ():
            name = f"spec.ephemeralContainers {each.get('name')!r}"
            if name not in self._noted:
                self._noted.add(name)
                self._events.warn(pod, "Unsupported", f"{name}: {NO_EPHEMERAL}")

    # ── Actions ─────────────────────────────────────────────────────────────────────────────────

    async def _perform(self, action: Action, pod: Pod, spec: PodSpec) -> float:
        instance = self.instance
        match action.verb:
            case Verb.WAIT:
                return RESYNC_SECONDS
            case Verb.FAIL:
                self._failure = Failure(action.reason, action.message)
                self._events.warn(pod, action.reason, action.message)
            case Verb.CREATE:
                return await self._create(pod, spec)
            case Verb.RELEASE:
                await self._release(pod)
            case Verb.ADOPT | Verb.DISCARD:
                await self._take_over(action.verb, pod, spec)
            case _:
                assert instance is not None, "decide asks for it only with an instance"
                await self._change(action, pod, spec, instance)
        return 0.0

    async def _change(self, action: Action, pod: Pod, spec: PodSpec, instance: Instance) -> None:
        match action.verb:
            case Verb.RETAG:
                tags = {**tags_of(instance), **self._following_tags(pod, spec)}
                await self._patch(instance, UpdateInstanceRequest(tags=tags))
            case Verb.RESTORE:
                async with self._shared.starts:
                    await self._post(instance, "restore")
                self._events.normal(pod, "Restored", f"memory of {instance.name} restored")
            case Verb.START:
                async with self._shared.starts:
                    await self._post(instance, "start")
            case Verb.STANDBY:
                await self._standby(pod, instance)
            case Verb.STOP:
                if action.reason:
                    self._failed_to_start(pod, action)
                grace = pod.metadata.deletion_grace_period_seconds
                await self._stop(pod, instance, spec.termination_grace_period_seconds if grace is None else grace)
            case Verb.REMOVE:
                await self._remove(instance)
                await materials.remove_volumes(self._site.local, self._site.name, self._uid)
        await self._shared.instances.refresh()

    def _failed_to_start(self, pod: Pod, action: Action) -> None:
        self._events.warn(pod, action.reason, action.message)
        pause = min(RESTART_PAUSE * 2.0 ** min(self._failed_starts, 8), MAX_PAUSE)
        self._start_at = trio.current_time() + pause
        self._failed_starts += 1

    def _following_tags(self, pod: Pod, spec: PodSpec) -> Mapping[str, str]:
        tags = wanted_tags(pod, spec, self._site.name)
        return {key: value for key, value in tags.items() if key in CHANGING}

    async def _standby(self, pod: Pod, instance: Instance) -> None:
        if problem := await save_or_stop(self._site.local, instance, pod.metadata.deletion_grace_period_seconds):
            self._events.warn(pod, "StandbyFailed", f"memory cannot be saved: {problem}")
        else:
            self._events.normal(pod, "Standby", f"memory of {instance.name} saved for its owner")

    async def _stop(self, pod: Pod, instance: Instance, grace: int) -> None:
        self._events.normal(pod, "Killing", f"Stopping container {pod.spec['containers'][0]['name']}")
        await stop_instance(self._site.local, instance, grace)

    async def _take_over(self, verb: Verb, pod: Pod, spec: PodSpec) -> None:
        """What an earlier pod of the same owner left behind."""
        owner = pod.metadata.controller
        assert owner is not None, "only owners leave something"
        left = self._shared.instances.index.left_by(owner.uid, pod.metadata.namespace, self._shared.pods.items)
        if left is None:
            return
        if verb is Verb.ADOPT:
            tags = {**wanted_tags(pod, spec, self._site.name), names.SELF: left.name}
            await self._patch(left, UpdateInstanceRequest(tags={**tags_of(left), **tags}))
            self._events.normal(pod, "Adopted", f"continues {left.name}")
        else:
            self._events.warn(pod, "StateDiscarded", f"{left.name} was made from another specification")
            await self._remove(left)
        await self._shared.instances.refresh()

    async def _release(self, pod: Pod) -> None:
        """Nothing of the pod is left here, or it is kept for the owner: delete its object."""
        if self.instance is None:
            await materials.remove_volumes(self._site.local, self._site.name, self._uid)
            await self._report(pod, read_pod(pod.spec))
        path = pods_path(pod.metadata.namespace, pod.metadata.name)
        try:
            await self._site.api.delete(path, uid=self._uid, grace=0)
        except Refused as error:
            if not error.is_absent and not error.is_conflict:
                raise

    # ── Creation ────────────────────────────────────────────────────────────────────────────────

    async def _create(self, pod: Pod, spec: PodSpec) -> float:
        """Make the next thing that is missing. Raises Refusal, ApiError, LocalError."""
        try:
            with materials.Choice(self._shared.devices) as choice:
                wanted = await self._wanted(pod, spec, choice)
                async with self._shared.starts:
                    return await self._make(pod, spec, wanted)
        except Missing as missing:
            self._doing = Doing("CreateContainerConfigError", str(missing))
            self._events.warn(pod, "Failed", f"Error: {missing}")
            self._failures += 1
            return min(2.0**self._failures, RESYNC_SECONDS)
        except materials.ImageProblem as problem:
            return self._no_image(pod, spec, problem)
        except LocalRefused as error:
            return await self._not_made(pod, error)

    async def _wanted(self, pod: Pod, spec: PodSpec, choice: materials.Choice) -> Wanted:
        site = self._site
        sources = await materials.read_sources(site.api, pod, needed(spec), spec.service_account_name)
        placement = await materials.place(site.api, site.local, pod, spec, choice)
        return translate(pod, spec, facts_of(pod, spec, site.name, site.address), sources, placement)

    async def _make(self, pod: Pod, spec: PodSpec, wanted: Wanted) -> float:
        if names.is_golden(pod):
            return await self._make_fork(pod, spec, wanted)
        if not await self._have_image(pod, spec):
            return POLL_SECONDS
        await materials.make_volumes(self._site.local, pod, wanted, self._site.name)
        instance = await self._post_instance(wanted.request)
        self._events.normal(pod, "Created", f"Created instance {instance.name}")
        await self._shared.instances.refresh()
        return 0.0

    async def _post_instance(self, request: CreateInstanceRequest) -> Instance:
        return await self._site.local.post("/instances", request, Instance, timeout=CREATE_SECONDS)

    async def _have_image(self, pod: Pod, spec: PodSpec) -> bool:
        """Whether the image is ready; requests it if not. Raises ImageProblem, ApiError, LocalError."""
        if trio.current_time() < self._retry_image_at:
            why = f'Back-off pulling image "{spec.container.image}": {self._image_problem}'
            raise materials.ImageProblem("ImagePullBackOff", why)
        name, policy = spec.container.image, spec.container.image_pull_policy
        image = await materials.find_image(self._site.local, name)
        if policy == "Never" and not materials.is_ready(image):
            raise materials.ImageProblem("ErrImageNeverPull", f'image "{name}" is not present, and is not to be pulled')
        fresh = policy == "Always" and not self._requested
        if image is None or fresh or (image.status is ImageStatus.FAILED and not self._requested):
            self._events.normal(pod, "Pulling", f'Pulling image "{name}"')
            logins = await materials.image_logins(self._site.api, pod, spec)
            image = await materials.request_image(self._site.local, name, logins)
            self._requested = True
        if image.status is ImageStatus.FAILED:
            raise materials.failed(image)
        return self._is_pulled(pod, image)

    def _is_pulled(self, pod: Pod, image: Image) -> bool:
        if not materials.is_ready(image):
            self._doing = Doing("ContainerCreating", f"image {image.status}")
            return False
        if self._requested:
            self._events.normal(pod, "Pulled", f'Successfully pulled image "{image.name}"')
        self._image_id = materials.image_id(image)
        self._image_failures = 0
        return True

    def _no_image(self, pod: Pod, spec: PodSpec, problem: materials.ImageProblem) -> float:
        self._doing = Doing(problem.reason, str(problem))
        left = self._retry_image_at - trio.current_time()
        if left > 0:
            return left
        self._events.warn(pod, "Failed", f'Failed to pull image "{spec.container.image}": {problem}')
        self._image_problem = f"{problem.reason}: {problem}"
        self._requested = False
        pause = min(IMAGE_PAUSE * 2.0 ** min(self._image_failures, 8), MAX_PAUSE)
        self._image_failures += 1
        self._retry_image_at = trio.current_time() + pause
        return 2.0  # then it is shown as ImagePullBackOff

    async def _not_made(self, pod: Pod, error: LocalRefused) -> float:
        """The server refused to make the instance. Raises it again if that may pass."""
        if error.http in (400, 501):
            self._fail(pod, "Unsupported", error.message)
            return 0.0
        await self._shared.instances.refresh()
        if self.instance is not None:  # an earlier request did it, and its answer was lost
            return 0.0
        if error.code != "insufficient_resources":
            self._events.warn(pod, "FailedCreate", error.message)
            raise error
        started = pod.status.start_time
        if started is None or (datetime.now(UTC) - started).total_seconds() < NO_ROOM_SECONDS:
            self._doing = Doing("ContainerCreating", error.message)
            self._events.warn(pod, "FailedCreate", error.message)
            return 2.0
        kind = next((kind for kind in ("memory", "cpu") if kind in error.message.lower()), "resources")
        self._fail(pod, f"OutOf{kind}", error.message)
        return 0.0

    def _fail(self, pod: Pod, reason: str, message: str) -> None:
        self._failure = Failure(reason, message)
        self._events.warn(pod, reason, message)

    # ── Forks of a golden instance ──────────────────────────────────────────────────────────────

    async def _make_fork(self, pod: Pod, spec: PodSpec, wanted: Wanted) -> float:
        check_golden(pod, spec)
        digest = golden_digest(pod)
        async with self._shared.golden.setdefault(digest, trio.Lock()):
            golden = self._shared.instances.index.golden.get(digest)
            if golden is None:
                return await self._boot_golden(pod, spec, wanted, digest)
            if golden.state is not InstanceState.STANDBY:
                return await self._ripen(pod, spec, golden)
        request = ForkInstanceRequest(
            name=wanted.request.name, target_state=TargetState.RUNNING, tags=wanted.request.tags
        )
        await self._site.local.post(f"/instances/{golden.id}/fork", request, Instance, timeout=CREATE_SECONDS)
        self._events.normal(pod, "Forked", f"Forked from {golden.name}")
        await self._shared.instances.refresh()
        return 0.0

    async def _boot_golden(self, pod: Pod, spec: PodSpec, wanted: Wanted, digest: str) -> float:
        if not await self._have_image(pod, spec):
            return POLL_SECONDS
        request = golden_request(wanted, digest)
        await self._post_instance(request)
        self._events.normal(pod, "Booting", f"Booting {request.name}, from which pods are forked")
        await self._shared.instances.refresh()
        return POLL_SECONDS

    async def _ripen(self, pod: Pod, spec: PodSpec, golden: Instance) -> float:
        """Bring the golden instance to standby once its program is ready."""
        self._doing = Doing("ContainerCreating", f"{golden.name} is {golden.state}")
        if golden.state is InstanceState.RUNNING:
            if await self._until_deleted(partial(self._is_ripe, spec, golden), False):
                await self._post(golden, "standby")
                await self._shared.instances.refresh()
                return 0.0
        elif golden.state is InstanceState.STOPPED:
            self._events.warn(
                pod, "GoldenEnded", f"{golden.name} has ended: {golden.exit_message or 'no reason given'}"
            )
            await self._remove(golden)
            await self._shared.instances.refresh()
            return IMAGE_PAUSE
        return POLL_SECONDS

    async def _is_ripe(self, spec: PodSpec, golden: Instance) -> bool:
        """Whether the program of the golden instance has started and is ready."""
        container = spec.container
        for probe in (container.startup_probe, container.readiness_probe):
            if probe is not None and not await passes(probe, container, self._site.local, golden):
                return False
        return True

    # ── Calls of the server ─────────────────────────────────────────────────────────────────────

    async def _post(self, instance: Instance, verb: str) -> None:
        await change_instance(self._site.local, instance, verb)

    async def _patch(self, instance: Instance, body: UpdateInstanceRequest) -> None:
        given = {key: value for key, value in msgspec.structs.asdict(body).items() if value is not None}
        await self._site.local.call("PATCH", f"/instances/{instance.id}", given)

    async def _remove(self, instance: Instance) -> None:
        await remove_instance(self._site.local, instance)

    # ── Report ──────────────────────────────────────────────────────────────────────────────────

    async def _probe(self, pod: Pod, spec: PodSpec) -> float:
        """Run the startup or readiness probe if it is due. Returns the seconds until one is again."""
        instance, container = self.instance, spec.container
        has_probe = container.readiness_probe is not None or container.startup_probe is not None
        if not has_probe or instance is None or instance.state is not InstanceState.RUNNING:
            self._probing = None
            return math.inf
        if self._probing is None or self._probing.started_at != instance.started_at:
            is_started = was_started(pod.status, instance)
            self._probing = Probing(container, instance.started_at, is_started=is_started)
        pause = await self._until_deleted(partial(self._probing.look, self._site.local, instance), 0.0)
        if self._probing.is_started:
            self._failed_starts = 0
        return pause

    async def _until_deleted(self, probe: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """What ``probe`` says. It may take as long as the pod allows; the pod's deletion does not wait for it."""
        said = otherwise
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_deleted, nursery.cancel_scope)
            said = await probe()
            nursery.cancel_scope.cancel()
        return said

    async def _cancel_when_deleted(self, scope: trio.CancelScope) -> None:
        pods = self._shared.pods.items
        while self._uid in pods and pods[self._uid].metadata.deletion_timestamp is None:
            await trio.sleep(POLL_SECONDS)
            pods = self._shared.pods.items
        scope.cancel()

    async def _rotate(self, pod: Pod, spec: PodSpec) -> None:
        """Pass on new values of credentials; those in use are known by the version in the instance's tag."""
        instance = self.instance
        used = tags_of(instance).get(names.CREDENTIALS) if instance is not None else None
        if instance is None or used is None or pod.metadata.deletion_timestamp is not None:
            return
        try:
            secret = await materials.read_secret(self._site.api, pod.metadata.namespace, credentials_secret(pod, spec))
            _, values = credentials_of(secret)
        except (Missing, Refusal) as problem:
            self._events.warn(pod, "CredentialsNotRotated", str(problem))
            return
        if secret.metadata.resource_version == used or not values:
            return
        tags = {**tags_of(instance), names.CREDENTIALS: secret.metadata.resource_version}
        try:
            await self._patch(instance, UpdateInstanceRequest(env=values, tags=tags))
        except LocalRefused as error:
            self._events.warn(pod, "CredentialsNotRotated", error.message)
            return
        self._events.normal(pod, "CredentialsRotated", f"values of secret {secret.metadata.name!r} are in use")
        await self._shared.instances.refresh()

    async def _report(self, pod: Pod, spec: PodSpec) -> None:
        """Write the pod's status if it differs. Raises ApiError."""
        pod = self._shared.pods.items.get(self._uid, pod)
        probing, container = self._probing, spec.container
        status = derive_status(
            Seen(
                pod=pod,
                restart_policy=spec.restart_policy,
                instance=self.instance,
                image_id=self._image_id,
                doing=self._doing,
                failure=self._failure,
                ready=container.readiness_probe is None if probing is None else probing.is_ready,
                started=container.startup_probe is None if probing is None else probing.is_started,
                readiness_gates=tuple(gate.condition_type for gate in spec.readiness_gates),
                address=self._site.address,
                now=datetime.now(UTC),
            )
        )
        if not differs(pod.status, status):
            return
        path = f"{pods_path(pod.metadata.namespace, pod.metadata.name)}/status"
        try:
            written = await self._site.api.patch(path, status_patch(pod, status), Pod, how=Patch.STRATEGIC)
        except Refused as error:
            if error.is_absent or error.is_conflict:  # gone, or another pod with its name
                return
            raise
        self._shared.pods.put(written)
        if _runs(status) and not _runs(pod.status):
            self._events.normal(pod, "Started", f"Started container {spec.container.name}")


def concerned(
    instances: Iterable[Instance], workers: Collection[str], by_pod: Mapping[str, Instance]
) -> frozenset[str]:
    """The pods that have something to do after ``instances`` have changed: their own; and those that have none yet, if
    it is one that others begin from (golden, or left by an owner). Pure."""
    found: set[str] = set()
    for instance in instances:
        tags = tags_of(instance)
        if names.GOLDEN in tags or names.is_retained(names.owner_of(tags)):
            found.update(uid for uid in workers if uid not in by_pod)
        found.add(tags.get(names.POD_UID, ""))
    return frozenset(found.intersection(workers))


def _runs(status: PodStatus) -> bool:
    return any(each.state.running is not None for each in status.container_statuses)


def status_patch(pod: Pod, status: PodStatus) -> dict[str, Any]:
    """A strategic merge patch that applies only to the pod with this uid. Pure."""
    body: dict[str, Any] = msgspec.to_builtins(status)
    for condition in body.get("conditions", ()):
        condition.setdefault("reason", None)  # merged field by field: what is absent would stay
        condition.setdefault("message", None)
    for name in ("podIPs", "hostIPs"):
        if name in body:
            body[name] = [{"$patch": "replace"}, *body[name]]
    return {"metadata": {"uid": pod.metadata.uid}, "status": body}


class Pods:
    """All pods of the node."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def find(self, namespace: str, name: str) -> Served | None:
        return next((each for each in self.all() if each.pod.key == f"{namespace}/{name}"), None)

    def all(self) -> tuple[Served, ...]:
        by_pod = self.shared.instances.index.by_pod
        return tuple(Served(pod, by_pod.get(uid)) for uid, pod in self.shared.pods.items.items())

    async def run(self) -> None:
        shared = self.shared
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shared.pods.run)
            nursery.start_soon(shared.events.run)
            await shared.instances.synced.wait()
            await shared.pods.synced.wait()
            while True:
                for uid in shared.pods.items:
                    if uid not in shared.workers:
                        shared.workers[uid] = Worker(shared, uid)
                        nursery.start_soon(self._serve, uid)
                await shared.changed.wait()
                shared.changed = trio.Event()

    async def _serve(self, uid: str) -> None:
        try:
            await self.shared.workers[uid].run()
        finally:
            del self.shared.workers[uid]
            self.shared.changed.set()  # it may have come back meanwhile
