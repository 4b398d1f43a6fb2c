"""Decisions about pods: what holds for every pod and instance, and that decisions lead somewhere.

Hypothesis tries every combination of what may be known.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hypeman.instances.model.types import (
    HealthState,
    Instance,
    InstanceHealthStatus,
    InstanceNetwork,
    InstanceState,
    RestartStatus,
)
from hypeman.kube import names
from hypeman.kube.decide import UP, Known, Owner, Verb, decide, decide_orphan, fence, index, is_ours
from hypeman.kube.status import Failure, Seen, derive_status, differs
from hypeman.kube.types import ContainerState, ContainerStatus, ObjectMeta, Pod, PodStatus, Running

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NODE = "here"
DESTROYS = (Verb.REMOVE, Verb.DISCARD)
BEGINS = (Verb.CREATE, Verb.ADOPT, Verb.RESTORE, Verb.START)


def instance(state: InstanceState = InstanceState.RUNNING, **fields: Any) -> Instance:
    name = fields.pop("name", "web-1")
    tags = {names.NODE: NODE, names.SELF: name, names.POD_UID: "pod-1", names.SPEC: "s", **fields.pop("tags", {})}
    made = Instance(
        id=f"id-{name}",
        name=name,
        image="nginx",
        state=state,
        created_at=NOW,
        tags=tags,
        started_at=NOW,
        network=InstanceNetwork(enabled=True, ip="10.0.0.2"),
    )
    return msgspec.structs.replace(made, **fields)


instances = st.builds(
    instance,
    st.sampled_from(InstanceState),
    exit_code=st.sampled_from([None, 0, 1]),
    health_status=st.sampled_from([InstanceHealthStatus(status=state) for state in HealthState]),
    restart_status=st.sampled_from([RestartStatus(), RestartStatus(blocked_reason="manual_stop")]),
    tags=st.sampled_from([{}, {names.OWNER_UID: "another"}, {names.SPEC: "another"}]),
)
pods = st.builds(
    lambda deleted, phase, started, ran: Pod(
        metadata=ObjectMeta(name="web", namespace="d", uid="pod-1", deletion_timestamp=NOW if deleted else None),
        spec={"containers": [{"name": "main", "image": "nginx"}]},
        status=PodStatus(
            phase=phase,
            start_time=NOW - timedelta(seconds=100) if started else None,
            container_statuses=(
                ContainerStatus("main", ContainerState(running=Running(NOW)), True, 0, "i", "", container_id="x"),
            )
            if ran
            else (),
        ),
    ),
    st.booleans(),
    st.sampled_from(["", "Pending", "Running", "Succeeded", "Failed"]),
    st.booleans(),
    st.booleans(),
)
everything = st.builds(
    Known,
    pod=pods,
    restart_policy=st.sampled_from(["Always", "OnFailure", "Never"]),
    tags=st.sampled_from([{}, {names.OWNER_UID: "me"}]),
    spec=st.just("s"),
    instance=st.none() | instances,
    left=st.none() | instances,
    owner=st.sampled_from(Owner),
    failed_to_start=st.booleans(),
    lease_valid=st.booleans(),
    deadline=st.sampled_from([None, 10.0, 1000.0]),
    now=st.just(NOW),
)


@given(everything)
def test_what_every_decision_keeps_to(known: Known) -> None:
    verb, pod = decide(known).verb, known.pod
    deleted = pod.metadata.deletion_timestamp is not None
    if verb is Verb.CREATE:
        assert known.instance is None, "never a second one"
        assert known.left is None, "what is left is adopted or discarded first"
    if verb in BEGINS:
        assert known.lease_valid and not deleted and pod.status.phase not in ("Succeeded", "Failed")
    if verb is Verb.RELEASE:
        assert deleted
        kept = known.instance is not None
        assert not kept or (known.owner is Owner.ALIVE and known.instance.state is InstanceState.STANDBY)  # type: ignore[union-attr]
    if verb is Verb.REMOVE:
        assert deleted and known.owner is not Owner.UNKNOWN
        assert known.instance is not None and known.instance.state not in UP, "it was stopped first"
        assert known.owner is not Owner.ALIVE or known.instance.state is not InstanceState.STANDBY
    if verb is Verb.DISCARD:
        assert known.left is not None and known.left.state is not InstanceState.UNKNOWN
    if verb in (Verb.RESTORE, Verb.START, Verb.STOP, Verb.STANDBY, Verb.RETAG, Verb.REMOVE):
        assert known.instance is not None


AFTER = {
    Verb.STOP: InstanceState.STOPPED,
    Verb.STANDBY: InstanceState.STANDBY,
    Verb.RESTORE: InstanceState.RUNNING,
    Verb.START: InstanceState.RUNNING,
}


def applied(known: Known, verb: Verb) -> Known:
    """What is known after the action, if all goes well."""
    replace = msgspec.structs.replace
    match verb:
        case Verb.CREATE:
            return replace(known, instance=instance(tags=dict(known.tags)))
        case Verb.ADOPT:
            assert known.left is not None
            return replace(known, left=None, instance=replace(known.left, tags={names.SPEC: "s", **known.tags}))
        case Verb.DISCARD:
            return replace(known, left=None)
        case Verb.RETAG:
            assert known.instance is not None
            return replace(known, instance=replace(known.instance, tags={**(known.instance.tags or {}), **known.tags}))
        case Verb.REMOVE:
            return replace(known, instance=None)
        case Verb.FAIL:
            return replace(known, pod=replace(known.pod, status=replace(known.pod.status, phase="Failed")))
        case _:
            assert known.instance is not None
            status = RestartStatus(blocked_reason="manual_stop") if verb is Verb.STOP else RestartStatus()
            after = replace(known.instance, state=AFTER[verb], restart_status=status, health_status=HEALTHY)
            return replace(known, instance=after, failed_to_start=False)


HEALTHY = InstanceHealthStatus(status=HealthState.HEALTHY)


@given(everything)
def test_decisions_come_to_an_end(known: Known) -> None:
    for _ in range(8):
        verb = decide(known).verb
        if verb in (Verb.WAIT, Verb.RELEASE):
            break
        known = applied(known, verb)
    else:
        raise AssertionError("it goes round in circles")
    deleted = known.pod.metadata.deletion_timestamp is not None
    if verb is Verb.WAIT and deleted:
        assert known.owner is Owner.UNKNOWN
    if verb is Verb.WAIT and not deleted and known.lease_valid and known.pod.status.phase in ("", "Pending", "Running"):
        waits = known.left is not None and known.left.state is InstanceState.UNKNOWN
        assert known.instance is not None or waits


@given(instances, st.sampled_from(Owner), st.booleans(), st.booleans(), st.booleans())
def test_orphans_are_removed_only_for_a_reason(
    found: Instance, owner: Owner, gone: bool, wanted: bool, golden: bool
) -> None:
    if golden:
        found = msgspec.structs.replace(found, tags={**(found.tags or {}), names.GOLDEN: "g"})
    verb = decide_orphan(found, owner, pod_is_gone=gone, golden_wanted=wanted)
    if verb is Verb.REMOVE:
        assert owner in (Owner.GONE, Owner.NONE)
        assert golden or gone
        assert not (golden and wanted)
    if verb is Verb.STANDBY:
        assert owner is Owner.ALIVE and gone


@given(
    instances,
    st.sampled_from(["keep", "standby", "stop"]),
    st.sampled_from(["0", "3", "300", names.FOREVER]),
    st.floats(0, 1000),
)
def test_fencing_waits_as_long_as_the_cluster(found: Instance, policy: str, tolerates: str, lost: float) -> None:
    found = msgspec.structs.replace(
        found, tags={**(found.tags or {}), names.FENCING: policy, names.TOLERATES: tolerates}
    )
    due = fence([found], NODE, lost_for=lost, grace=50)
    if due:
        assert found.state in UP and policy != "keep" and tolerates != names.FOREVER
        assert lost >= 50 + float(tolerates)
    elif found.state in UP and policy != "keep" and tolerates != names.FOREVER:
        assert lost < 50 + float(tolerates)


def test_a_program_that_did_not_start_waits_before_it_is_started_again() -> None:
    stopped = instance(InstanceState.STOPPED, restart_status=RestartStatus(blocked_reason="manual_stop"))
    known = Known(pod=Pod(status=PodStatus(phase="Running")), spec="s", instance=stopped, now=NOW)
    assert decide(known).verb is Verb.START
    assert decide(msgspec.structs.replace(known, held_back=True)).verb is Verb.WAIT


def test_a_fork_with_the_tags_of_its_source_is_not_ours() -> None:
    ours, fork = instance(), instance(name="mine", tags={names.SELF: "web-1"})
    assert is_ours(ours, NODE) and not is_ours(fork, NODE)
    assert index([fork, ours], NODE).by_pod == {"pod-1": ours}
    assert not fence([fork], NODE, lost_for=1e6, grace=1)


@given(everything, st.booleans(), st.booleans())
def test_a_status_is_stable_and_final(known: Known, ready: bool, fails: bool) -> None:
    seen = Seen(
        pod=known.pod,
        restart_policy=known.restart_policy,
        instance=known.instance,
        failure=Failure("Unsupported", "spec.x") if fails else None,
        ready=ready,
        readiness_gates=("example.com/gate",),
        address="192.0.2.1",
        now=NOW,
    )
    first = derive_status(seen)
    written = msgspec.structs.replace(known.pod, status=first)
    later = msgspec.structs.replace(seen, pod=written, now=NOW + timedelta(hours=1))
    assert not differs(first, derive_status(later)), "nothing has changed"
    if known.pod.status.phase in ("Succeeded", "Failed"):
        assert first.phase == known.pod.status.phase
    conditions = {condition.type: condition.status for condition in first.conditions}
    assert conditions["Ready"] == "False", "its gate is not open"
    assert msgspec.json.decode(msgspec.json.encode(first), type=PodStatus) == first
    for status in first.container_statuses:
        state = status.state
        assert sum(part is not None for part in (state.waiting, state.running, state.terminated)) == 1
        assert not status.ready or state.running is not None


RUNS = 4
STEPS = [
    msgspec.structs.replace(
        instance(state), started_at=NOW + timedelta(seconds=100 * run), exit_code=code,
        stopped_at=NOW + timedelta(seconds=100 * run + 50), restart_status=RestartStatus(attempts=attempts),
    )
    for run in range(RUNS)
    for state, attempts, code in (
        (InstanceState.INITIALIZING, run, None), (InstanceState.RUNNING, run, None), (InstanceState.STOPPED, run, 4),
        (InstanceState.STOPPED, run + 1, None),
    )
]  # fmt: skip
"""A program that ends again and again. Its server counts an attempt as it begins, and then forgets the exit code."""


@given(st.lists(st.booleans(), min_size=len(STEPS), max_size=len(STEPS)))
def test_a_restart_counts_once_and_says_how_it_ended(looks: list[bool]) -> None:
    """Whatever the node sees of it."""
    pod = Pod(spec={"containers": [{"name": "main", "image": "nginx"}]})
    codes = dict[datetime | None, int | None]()
    for number, step in enumerate(STEPS):
        if not looks[number]:
            continue
        status = derive_status(Seen(pod=pod, instance=step, now=NOW))
        [container] = status.container_statuses
        run = number // (len(STEPS) // RUNS)
        assert container.restart_count == run if container.state.running else container.restart_count <= run
        if step.state is InstanceState.STOPPED:
            assert container.last_state.terminated is not None
            known = codes.setdefault(step.started_at, step.exit_code)
            assert container.last_state.terminated.exit_code == (255 if known is None else known)
        pod = msgspec.structs.replace(pod, status=status)
