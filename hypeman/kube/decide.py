"""Pods ↔ instances: what to do next. Pure: what is known → one action.

The tags of an instance are all that is remembered. A decision is made again from what is there after each action, so a
node program that was killed at any moment continues where it was: it finds the instance by its tag, or does not.

    pod                      instance     action
    bound, alive             none         Create; Adopt what its owner left in standby
                             standby      Restore
                             stopped      nothing: the server restarts it by policy. Start, if it was stopped by command
                             running      Stop, to be started again, if its startup probe failed
                             others       nothing
    bound, ended             up           Stop
    being deleted            up           Standby if its owner outlives it, else Stop
                             down         Remove, or keep it for the owner; then Release the pod
    gone                     any          Keep while the owner may want it, else Remove (``decide_orphan``)

Nothing is created, started or restored while the node's lease is not valid: the cluster may have given the pod to
another node. Nothing is removed for a pod or owner about which nothing is known.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from msgspec import Struct

from hypeman.instances.model.types import HealthState, Instance, InstanceState, RestartStatus
from hypeman.kube import names
from hypeman.kube.types import Pod

UP = frozenset({InstanceState.INITIALIZING, InstanceState.RUNNING, InstanceState.PAUSED, InstanceState.SHUTDOWN})


class Owner(enum.Enum):
    """What is known of a pod's owner that outlives its pods."""

    NONE = "none"
    """The pod has no such owner."""
    ALIVE = "alive"
    GONE = "gone"
    """Confirmed: a 404 that names it, another uid, or it is being deleted."""
    UNKNOWN = "unknown"
    """Could not be looked up."""


class Verb(enum.Enum):
    WAIT = "wait"
    """Nothing, until something changes."""
    CREATE = "create"
    ADOPT = "adopt"
    """The instance is of an earlier pod of the same owner: make it this pod's."""
    RETAG = "retag"
    """The pod has another owner now."""
    RESTORE = "restore"
    START = "start"
    STOP = "stop"
    STANDBY = "standby"
    REMOVE = "remove"
    """Delete the instance, with the volumes that were made for the pod."""
    DISCARD = "discard"
    """Delete an instance whose saved memory does not fit the pod any more."""
    FAIL = "fail"
    """The pod has ended, for a reason that is not its program's exit."""
    RELEASE = "release"
    """Delete the pod's object: nothing of it is left here, or what is left is kept for its owner."""


class Action(Struct, frozen=True):
    verb: Verb
    reason: str = ""
    """Of the pod's failure, in Kubernetes' notation."""
    message: str = ""


WAIT = Action(Verb.WAIT)


class Known(Struct, frozen=True, kw_only=True):
    """What a decision about one pod depends on."""

    pod: Pod
    restart_policy: str = "Always"
    tags: Mapping[str, str] = {}
    """What the instance's tags should be, as far as they may change."""
    spec: str = ""
    """Hash of what the guest is made of."""
    instance: Instance | None = None
    left: Instance | None = None
    """An instance that an earlier pod of the same owner left behind."""
    owner: Owner = Owner.NONE
    failed_to_start: bool = False
    """What the startup probe of the instance's run says."""
    held_back: bool = False
    """The last run failed to start, and the pause after it has not passed."""
    lease_valid: bool = True
    deadline: float | None = None
    """``activeDeadlineSeconds``"""
    now: datetime


def decide(known: Known) -> Action:
    pod = known.pod
    if pod.metadata.deletion_timestamp is not None:
        return _while_deleted(known)
    if pod.status.phase in ("Succeeded", "Failed"):
        up = known.instance is not None and known.instance.state in UP
        return Action(Verb.STOP) if up else WAIT
    if not known.lease_valid:
        return WAIT
    if (late := _past_deadline(known)) is not None:
        return late
    return _without_instance(known) if known.instance is None else _with_instance(known, known.instance)


def _while_deleted(known: Known) -> Action:
    instance = known.instance
    if instance is None:
        return Action(Verb.RELEASE)
    if known.owner is Owner.UNKNOWN:
        return WAIT
    if known.owner is Owner.ALIVE:
        if instance.state is InstanceState.STANDBY:
            return Action(Verb.RELEASE)
        if instance.state is InstanceState.RUNNING:
            return Action(Verb.STANDBY)
    return Action(Verb.STOP) if instance.state in UP else Action(Verb.REMOVE)


def _past_deadline(known: Known) -> Action | None:
    started = known.pod.status.start_time
    if known.deadline is None or started is None or known.now < started + timedelta(seconds=known.deadline):
        return None
    return Action(Verb.FAIL, "DeadlineExceeded", "Pod was active on the node longer than the specified deadline")


def _without_instance(known: Known) -> Action:
    if (left := known.left) is not None:
        if left.state is InstanceState.UNKNOWN:
            return WAIT
        same = tags_of(left).get(names.SPEC) == known.spec
        return Action(Verb.ADOPT if same and left.state in (InstanceState.STANDBY, *UP) else Verb.DISCARD)
    if known.restart_policy == "Never" and any(status.container_id for status in known.pod.status.container_statuses):
        return Action(Verb.FAIL, "InstanceLost", "the pod's instance was deleted on its host")
    return Action(Verb.CREATE)


def _with_instance(known: Known, instance: Instance) -> Action:
    if any(tags_of(instance).get(key) != value for key, value in known.tags.items()):
        return Action(Verb.RETAG)
    if instance.state is InstanceState.STANDBY:
        return Action(Verb.RESTORE)
    if instance.state is InstanceState.STOPPED and _has_to_run(known, instance):
        return WAIT if known.held_back else Action(Verb.START)
    if instance.state is not InstanceState.RUNNING:
        return WAIT
    never = known.restart_policy == "Never"
    if never and instance.health_status.status is HealthState.UNHEALTHY:
        return Action(Verb.FAIL, "Unhealthy", "the liveness probe failed, and the pod is not to be restarted")
    if known.failed_to_start:
        why = "the startup probe failed"
        return Action(Verb.FAIL, "Unhealthy", f"{why}, and the pod is not to be restarted") if never else Action(
            Verb.STOP, "Unhealthy", f"{why}: the program is started again"
        )  # fmt: skip
    return WAIT


def _has_to_run(known: Known, instance: Instance) -> bool:
    """Whether a stopped instance will not be started by the server, but should be."""
    status = instance.restart_status
    blocked = status.blocked_reason if isinstance(status, RestartStatus) else None
    return blocked == "manual_stop" and not is_final(known.restart_policy, instance)


def is_final(restart_policy: str, instance: Instance) -> bool:
    """Whether the program has ended for good."""
    if instance.state is not InstanceState.STOPPED:
        return False
    return restart_policy == "Never" or (restart_policy == "OnFailure" and instance.exit_code == 0)


# ── Instances whose pod is gone ─────────────────────────────────────────────────────────────────


def decide_orphan(instance: Instance, owner: Owner, *, pod_is_gone: bool, golden_wanted: bool = False) -> Verb:
    """``pod_is_gone``: confirmed. ``owner``: of a golden instance any controller, else one that outlives its pods."""
    if names.GOLDEN in tags_of(instance):
        return Verb.REMOVE if not golden_wanted and owner in (Owner.GONE, Owner.NONE) else Verb.WAIT
    if not pod_is_gone or owner is Owner.UNKNOWN:
        return Verb.WAIT
    if owner is Owner.ALIVE:
        return Verb.STANDBY if instance.state is InstanceState.RUNNING else Verb.WAIT
    return Verb.REMOVE


# ── Instances and their tags ────────────────────────────────────────────────────────────────────


def tags_of(instance: Instance) -> Mapping[str, str]:
    return instance.tags or {}


def is_ours(instance: Instance, node: str) -> bool:
    """Whether the node made it. A fork of it that a user made carries the same tags, but not its name."""
    tags = tags_of(instance)
    return tags.get(names.NODE) == node and tags.get(names.SELF) == instance.name


class Index(Struct, frozen=True):
    """The node's instances by what is known of them."""

    by_pod: Mapping[str, Instance]
    left: Mapping[str, tuple[Instance, ...]]
    """By the uid of an owner that outlives its pods."""
    golden: Mapping[str, Instance]

    def left_by(self, owner_uid: str, namespace: str, living: Iterable[str]) -> Instance | None:
        """What pods of the owner left that are not among the uids ``living``; the newest.

        Only in ``namespace``: anyone who may create pods can name an owner of another one.
        """
        alive = set(living)
        found = [
            each
            for each in self.left.get(owner_uid, ())
            if tags_of(each).get(names.NAMESPACE) == namespace and tags_of(each).get(names.POD_UID) not in alive
        ]
        return max(found, key=lambda each: each.created_at, default=None)


def index(instances: Iterable[Instance], node: str) -> Index:
    by_pod: dict[str, Instance] = {}
    left: dict[str, tuple[Instance, ...]] = {}
    golden: dict[str, Instance] = {}
    for instance in instances:
        if not is_ours(instance, node):
            continue
        tags = tags_of(instance)
        if names.GOLDEN in tags:
            golden[tags[names.GOLDEN]] = instance
        elif names.POD_UID in tags:
            by_pod[tags[names.POD_UID]] = instance
            if names.is_retained(names.owner_of(tags)):
                left[tags[names.OWNER_UID]] = (*left.get(tags[names.OWNER_UID], ()), instance)
    return Index(by_pod, left, golden)


# ── Fencing ─────────────────────────────────────────────────────────────────────────────────────


class Fence(Struct, frozen=True):
    instance: Instance
    verb: Verb


def fence(instances: Iterable[Instance], node: str, *, lost_for: float, grace: float) -> tuple[Fence, ...]:
    """Which VMs have to end by themselves, ``lost_for`` seconds after the last heartbeat.

    After ``grace`` the cluster marks the node, and after the pod's own toleration it gives the pod to another node.
    """
    found = []
    for instance in instances:
        tags = tags_of(instance)
        if not is_ours(instance, node) or names.POD_UID not in tags or instance.state not in UP:
            continue
        tolerated = tags.get(names.TOLERATES, "0")
        if tolerated == names.FOREVER or lost_for < grace + float(tolerated):
            continue
        match tags.get(names.FENCING, "standby"):
            case "stop":
                found.append(Fence(instance, Verb.STOP))
            case "standby":
                found.append(Fence(instance, Verb.STANDBY))
    return tuple(found)
