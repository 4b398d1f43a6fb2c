"""The status of a pod, as a kubelet reports it. Pure: pod, instance and what is being done → PodStatus.

Times have whole seconds, as in the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec
from msgspec import Struct

from hypeman.instances.model.types import Instance, InstanceState
from hypeman.kube.decide import is_final
from hypeman.kube.types import (
    Condition,
    ContainerState,
    ContainerStatus,
    Pod,
    PodIP,
    PodStatus,
    Running,
    Terminated,
    Waiting,
)

OOM_EXIT = 137
NO_EPHEMERAL = "a pod has exactly one container here; `kubectl exec` starts a shell in it"


class Doing(Struct, frozen=True):
    """Why a container has not been started: a reason of the kubelet, and a text."""

    reason: str = "ContainerCreating"
    message: str = ""


class Failure(Struct, frozen=True):
    """The pod has ended without its program's doing."""

    reason: str
    message: str


class Seen(Struct, frozen=True, kw_only=True):
    """What a status depends on."""

    pod: Pod
    restart_policy: str = "Always"
    instance: Instance | None = None
    image_id: str = ""
    doing: Doing = Doing()
    failure: Failure | None = None
    ready: bool = True
    """What the readiness probe says; without one, true."""
    started: bool = True
    """What the startup probe has said; without one, true."""
    readiness_gates: tuple[str, ...] = ()
    address: str = ""
    """Of the host."""
    now: datetime


def derive_status(seen: Seen) -> PodStatus:
    """The whole status. What does not change keeps its times, so that an unchanged status is equal."""
    before = seen.pod.status
    container = _container(seen)
    phase = _phase(seen, container)
    ip = _ip(seen.instance) or before.pod_ip
    failure = seen.failure
    if failure is None and before.phase == "Failed" and before.reason:
        failure = Failure(before.reason, before.message)
    return PodStatus(
        phase=phase,
        reason=failure.reason if failure and phase == "Failed" else "",
        message=failure.message if failure and phase == "Failed" else "",
        conditions=_conditions(seen, phase, container),
        container_statuses=(container,) if container is not None else (),
        ephemeral_container_statuses=_ephemeral(seen.pod),
        host_ip=seen.address,
        host_ips=(PodIP(seen.address),),
        pod_ip=ip,
        pod_ips=(PodIP(ip),) if ip else (),
        start_time=before.start_time or whole(seen.now),
        observed_generation=before.observed_generation,
    )


def whole(moment: datetime) -> datetime:
    return moment.replace(microsecond=0)


def _container(seen: Seen) -> ContainerStatus | None:
    """None of a pod that was refused: it has no container."""
    if seen.instance is None and seen.failure is not None and not _has_run(seen.pod):
        return None
    spec = (seen.pod.spec.get("containers") or [{}])[0]
    before = next(iter(seen.pod.status.container_statuses), None)
    state = _state(seen, before)
    restarts, last = _restarts(seen, before)
    instance = seen.instance
    runs = state.running is not None
    return ContainerStatus(
        name=str(spec.get("name", "")),
        state=state,
        ready=runs and seen.started and seen.ready,
        restart_count=restarts,
        image=str(spec.get("image", "")),
        image_id=seen.image_id or (before.image_id if before else ""),
        last_state=last,
        started=runs and seen.started,
        container_id=f"hypeman://{instance.id}" if instance is not None else before.container_id if before else "",
    )


def was_started(status: PodStatus, instance: Instance) -> bool:
    """Whether the startup probe of this run has succeeded, as was reported."""
    known = next(iter(status.container_statuses), None)
    if known is None or not known.started or known.state.running is None or instance.started_at is None:
        return False
    return known.state.running.started_at == whole(instance.started_at)


def _has_run(pod: Pod) -> bool:
    return any(status.container_id for status in pod.status.container_statuses)


def _state(seen: Seen, before: ContainerStatus | None) -> ContainerState:
    instance = seen.instance
    if before is not None and before.state.terminated is not None and seen.pod.status.phase in ("Succeeded", "Failed"):
        return before.state
    if instance is None:
        if seen.failure is not None or seen.pod.metadata.deletion_timestamp is not None:
            return _without_instance(seen, before)
        return ContainerState(waiting=Waiting(seen.doing.reason, seen.doing.message))
    if instance.state in (InstanceState.RUNNING, InstanceState.PAUSED, InstanceState.SHUTDOWN):
        return ContainerState(running=Running(whole(instance.started_at) if instance.started_at else None))
    if instance.state is InstanceState.STOPPED:
        ended = _terminated(instance)
        if is_final(seen.restart_policy, instance) or seen.failure or seen.pod.metadata.deletion_timestamp:
            return ContainerState(terminated=ended)
        return ContainerState(
            waiting=Waiting("CrashLoopBackOff", f"back-off restarting failed container: {_why(instance)}")
        )
    if instance.state is InstanceState.UNKNOWN:
        return ContainerState(waiting=Waiting("InstanceUnknown", instance.state_error or ""))
    if instance.state is InstanceState.STANDBY:
        return ContainerState(waiting=Waiting("Standby", "the memory of the guest is saved"))
    return ContainerState(waiting=Waiting(seen.doing.reason, seen.doing.message))


def _without_instance(seen: Seen, before: ContainerStatus | None) -> ContainerState:
    if before is None:
        return ContainerState(waiting=Waiting(seen.doing.reason, seen.doing.message))
    if before.state.terminated is not None or before.state.waiting is not None:
        return before.state
    started = before.state.running.started_at if before.state.running else None
    return ContainerState(
        terminated=Terminated(
            exit_code=OOM_EXIT, reason="Error", started_at=started, finished_at=whole(seen.now),
            container_id=before.container_id,
        )
    )  # fmt: skip


def _terminated(instance: Instance) -> Terminated:
    code = instance.exit_code if instance.exit_code is not None else 255
    why = _why(instance)
    reason = "Completed" if code == 0 else "OOMKilled" if "memory" in why else "Error"
    return Terminated(
        exit_code=code,
        reason=reason,
        message="" if code == 0 else why,
        started_at=whole(instance.started_at) if instance.started_at else None,
        finished_at=whole(instance.stopped_at) if instance.stopped_at else None,
        container_id=f"hypeman://{instance.id}",
    )


def _why(instance: Instance) -> str:
    return instance.exit_message or ""


def _restarts(seen: Seen, before: ContainerStatus | None) -> tuple[int, ContainerState]:
    """How often it was started again, and how it ended before."""
    count, last = (before.restart_count, before.last_state) if before else (0, ContainerState())
    instance = seen.instance
    if instance is None:
        return count, last
    if instance.state is InstanceState.STOPPED and not is_final(seen.restart_policy, instance):
        last = _ended(instance, last)
    if instance.state is not InstanceState.RUNNING or instance.started_at is None:
        return count, last
    began = before.state.running.started_at if before and before.state.running else None
    ended = before.last_state.terminated.started_at if before and before.last_state.terminated else None
    now = whole(instance.started_at)
    attempts = instance.restart_status.attempts if instance.restart_status else 0
    return max(count + (now > (began or ended or now)), attempts), last


def _ended(instance: Instance, last: ContainerState) -> ContainerState:
    """How the run ended. An instance that is being started again no longer has its exit code; ``last`` may have it."""
    ended = _terminated(instance)
    known = last.terminated
    if instance.exit_code is None and known is not None and known.started_at == ended.started_at:
        return last
    return ContainerState(terminated=ended)


_NOT_YET = (InstanceState.CREATED, InstanceState.INITIALIZING, InstanceState.STANDBY)
"""States of the instance of a pod that does not run yet; standby, if it continues what an earlier pod left."""


def _phase(seen: Seen, container: ContainerStatus | None) -> str:
    before = seen.pod.status.phase
    if before in ("Succeeded", "Failed"):
        return before
    if seen.failure is not None:
        return "Failed"
    instance = seen.instance
    if instance is not None and is_final(seen.restart_policy, instance):
        return "Succeeded" if instance.exit_code == 0 else "Failed"
    if instance is not None and instance.state not in _NOT_YET:
        return "Running"
    return "Running" if before == "Running" else "Pending"


def _conditions(seen: Seen, phase: str, container: ContainerStatus | None) -> tuple[Condition, ...]:
    ended = phase in ("Succeeded", "Failed")
    ready = container is not None and container.ready and not ended
    why = "PodCompleted" if phase == "Succeeded" else "PodFailed" if ended else "ContainersNotReady"
    gates = [gate for gate in seen.readiness_gates if not _is_true(seen.pod, gate)]
    wanted: Mapping[str, tuple[bool, str, str]] = {
        "PodReadyToStartContainers": (_ip(seen.instance) != "" and not ended, "", ""),
        "Initialized": (True, "PodCompleted" if phase == "Succeeded" else "", ""),
        "Ready": (ready and not gates, "" if ready and not gates else "ReadinessGatesNotReady" if ready else why,
                  f"the status of pod readiness gate {gates[0]!r} is not True" if ready and gates else ""),
        "ContainersReady": (ready, "" if ready else why, ""),
        "PodScheduled": (True, "", ""),
    }  # fmt: skip
    return tuple(_condition(seen, name, *value) for name, value in wanted.items())


def _condition(seen: Seen, name: str, true: bool, reason: str, message: str) -> Condition:
    status = "True" if true else "False"
    before = next((condition for condition in seen.pod.status.conditions if condition.type == name), None)
    changed = whole(seen.now)
    if before is not None and before.status == status and before.last_transition_time is not None:
        changed = before.last_transition_time
    generation = before.observed_generation if before is not None else None
    return Condition(
        type=name, status=status, reason=reason, message=message, last_transition_time=changed,
        observed_generation=generation,
    )  # fmt: skip


def _is_true(pod: Pod, name: str) -> bool:
    return any(condition.type == name and condition.status == "True" for condition in pod.status.conditions)


def _ephemeral(pod: Pod) -> tuple[ContainerStatus, ...]:
    """``kubectl debug`` adds containers, which a VM has no place for. They count as ended, so that no client waits."""
    ended = Terminated(exit_code=1, reason="NotSupported", message=NO_EPHEMERAL)
    return tuple(
        ContainerStatus(
            name=str(each.get("name", "")), state=ContainerState(terminated=ended), ready=False, restart_count=0,
            image=str(each.get("image", "")), image_id="",
        )
        for each in pod.spec.get("ephemeralContainers") or ()
    )  # fmt: skip


def _ip(instance: Instance | None) -> str:
    return (instance.network.ip or "") if instance is not None and instance.network else ""


def differs(before: PodStatus, after: PodStatus) -> bool:
    """Whether ``after`` has to be written; conditions of others are left alone."""
    own = {condition.type for condition in after.conditions}
    kept = tuple(
        sorted((condition for condition in before.conditions if condition.type in own), key=lambda each: each.type)
    )
    wanted = tuple(sorted(after.conditions, key=lambda each: each.type))
    same = msgspec.structs.replace(before, conditions=kept) == msgspec.structs.replace(after, conditions=wanted)
    return not same
