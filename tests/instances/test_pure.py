"""The small pure parts: phases, admission, plans, accounting, ports."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.egress.types import EgressEnforcementMode
from hypeman.errors import InsufficientResources, InvalidState
from hypeman.guest.types import Exited, Fatal
from hypeman.hypervisor.interface import HALTED, ExitReason, VmmExit
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.images.types import ImageConfig
from hypeman.instances.life.machine import LiveVm
from hypeman.instances.life.operations.stop import exit_of
from hypeman.instances.model.admission import ALLOWED, Command, check_legal
from hypeman.instances.model.guest_boot import command_line, machine_id, signal_number
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.plan import plan_create, plan_delete, plan_start, plan_stop
from hypeman.instances.model.record import InstanceRecord, InstanceSpec, Intent, Operation
from hypeman.instances.model.steps import HoldTraffic, Reversible, TakeBack, Together
from hypeman.instances.model.types import InstanceState, VolumeMount
from hypeman.instances.model.view import describe_exit
from hypeman.instances.model.vm import DISK_PORTS, assign_ports, free_port, vm_disks, volume_disk_id
from hypeman.instances.rows import INTENTS
from hypeman.paths import Paths
from hypeman.resources.accounting import Holding, Limits, Totals, hold, totals
from hypeman.store import Store

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def record(**changes: object) -> InstanceRecord:
    spec = InstanceSpec(
        image="i",
        platform="linux/amd64",
        hypervisor=HypervisorKind.QEMU,
        vcpus=1,
        memory_bytes=1 << 30,
        hotplug_bytes=0,
        overlay_bytes=1 << 30,
        egress=EgressEnforcementMode.ALL,
        devices=("d",),
    )
    made = InstanceRecord(
        id="abc", name="a", number=1, spec=spec, digest="d", state=InstanceState.STOPPED, created_at=NOW,
        phases=Phases("stopped", NOW),
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_every_state_and_command_is_allowed_or_refused_with_a_remedy() -> None:
    for command in Command:
        for state in InstanceState:
            if state in ALLOWED[command]:
                check_legal(command, state, name="a")
            else:
                with pytest.raises(InvalidState, match=state.value) as caught:
                    check_legal(command, state, name="a")
                assert ":" in caught.value.message


def test_anything_can_be_deleted_and_whatever_lives_be_stopped() -> None:
    assert ALLOWED[Command.DELETE] == frozenset(InstanceState)
    assert InstanceState.UNKNOWN in ALLOWED[Command.STOP]


def test_phases_add_up() -> None:
    phases = Phases("created", NOW)
    phases = phases.entered("running", NOW + timedelta(seconds=2))
    phases = phases.entered("running", NOW + timedelta(seconds=3))
    phases = phases.entered("stopped", NOW + timedelta(seconds=5))
    phases = phases.entered("running", NOW + timedelta(seconds=6))
    assert phases.durations_ms(NOW + timedelta(seconds=10)) == {"created": 2000, "running": 7000, "stopped": 1000}


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(-5, 100)), max_size=20))
def test_phases_never_lose_time(moves: list[tuple[str, int]]) -> None:
    """Whatever the clock does, durations are never negative; with a clock that goes on they sum to the life."""
    phases, now, forward = Phases("a", NOW), NOW, True
    for phase, seconds in moves:
        forward = forward and seconds >= 0
        now += timedelta(seconds=seconds)
        phases = phases.entered(phase, now)
    durations = phases.durations_ms(now)
    assert all(value >= 0 for value in durations.values())
    if forward:
        assert sum(durations.values()) == (now - NOW) / timedelta(milliseconds=1)


def without_held_traffic(steps: list[Reversible]) -> list[Reversible]:
    """HoldTraffic is taken back by every end, though only a standby begins it."""
    return [step for step in steps if not isinstance(step, HoldTraffic)]


def test_a_stop_takes_down_what_a_start_built_up() -> None:
    """But for devices, which stay bound until the instance is deleted."""
    built = [step for step in plan_start(record()) if type(step).__name__ != "BindDevices"]
    stop = plan_stop(record(), grace=1)[1:]
    undos = [undo for step in stop for undo in (step.steps if isinstance(step, Together) else (step,))]
    taken = [undo.step for undo in undos if isinstance(undo, TakeBack)]
    assert without_held_traffic(taken) == list(reversed(built))


def test_a_delete_takes_down_everything() -> None:
    taken = [step.step for step in plan_delete(record()) if isinstance(step, TakeBack)]
    assert without_held_traffic(taken) == list(reversed(plan_create(record())))


def test_plans_survive_the_store() -> None:
    """Stored before the first step, read back after a crash: the same steps."""
    for steps in (plan_create(record()), plan_stop(record(), grace=1), plan_delete(record())):
        intent = Intent(Operation.STOP, tuple(steps))
        assert INTENTS.decode(INTENTS.encode(intent)) == intent


@given(st.lists(st.booleans(), max_size=23))
def test_ports_are_given_once(overlays: list[bool]) -> None:
    volumes = [
        VolumeMount(volume_id=f"v{n}", mount_path=f"/d{n}", overlay=overlay, readonly=overlay)
        for n, overlay in enumerate(overlays)
    ]
    ports = assign_ports(volumes)
    assert len(set(ports.values())) == len(ports)
    assert all(1 <= port <= DISK_PORTS for port in ports.values())
    assert not any(volume.overlay for volume in volumes if volume.volume_id in ports)
    assert free_port(ports) not in ports.values()


@given(st.text(min_size=1, max_size=64), st.text(min_size=1, max_size=64))
def test_disk_ids_fit_a_serial_number_and_differ(one: str, two: str) -> None:
    assert len(volume_disk_id(one)) <= 20
    assert (volume_disk_id(one) == volume_disk_id(two)) == (one == two)


HOLDINGS = st.builds(
    Holding, vcpus=st.integers(0, 8), memory=st.integers(0, 100), disk=st.integers(0, 100),
    download=st.integers(0, 50), upload=st.integers(0, 50), disk_io=st.integers(0, 50),
)  # fmt: skip


async def test_totals_are_the_sum_of_what_is_held(store: Store) -> None:
    import random

    chance = random.Random(7)
    held: dict[str, Holding] = {}
    for _ in range(200):
        who = chance.choice("abcde")
        what = Holding(*(chance.randrange(20) for _ in range(6)))
        if chance.random() < 0.3:
            what = Holding()
        await store.write(partial(hold, holder=who, wanted=what, limits=Limits()))
        held[who] = what
    expected = Totals(
        vcpus=sum(h.vcpus for h in held.values()),
        memory=sum(h.memory for h in held.values()),
        disk=sum(h.disk for h in held.values()),
        network=sum(h.network for h in held.values()),
        disk_io=sum(h.disk_io for h in held.values()),
    )
    assert store.read(totals) == expected


async def test_a_limit_refuses_more_and_never_a_giving_back(store: Store) -> None:
    limits = Limits(memory=100)
    await store.write(lambda txn: hold(txn, "a", Holding(memory=80), Limits()))
    with pytest.raises(InsufficientResources, match="memory"):
        await store.write(lambda txn: hold(txn, "b", Holding(memory=21), limits))
    await store.write(lambda txn: hold(txn, "b", Holding(memory=20), limits))
    smaller = Limits(memory=10)
    await store.write(lambda txn: hold(txn, "a", Holding(memory=70), smaller))
    assert store.read(totals).memory == 90


def test_without_hotplug_all_disks_are_fixed() -> None:
    volumes = (VolumeMount(volume_id="data", mount_path="/data"),)
    changed = record(ports={"data": 2})
    changed = msgspec.structs.replace(changed, spec=msgspec.structs.replace(changed.spec, volumes=volumes))
    for hotplug, port in ((True, 2), (False, 0)):
        disks = vm_disks(changed, Path("/root.erofs"), Paths(Path("/data"), Path("/run")), hotplug=hotplug)
        assert [disk.id for disk in disks] == ["root", "overlay", "boot", volume_disk_id("data")]
        assert disks[-1].port == port


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "runs"),
    [
        (None, None, ("/init", "serve")),
        (None, ("--help",), ("/init", "--help")),
        (None, (), ("/init",)),
        (("sh",), None, ("sh",)),  # what the image gives its own entry point is nothing for another
        (("sh",), ("-c", "x"), ("sh", "-c", "x")),
        ((), ("sh",), ("sh",)),
    ],
)
def test_the_guest_runs_what_docker_would(
    entrypoint: tuple[str, ...] | None, cmd: tuple[str, ...] | None, runs: tuple[str, ...]
) -> None:
    assert command_line(ImageConfig(entrypoint=("/init",), cmd=("serve",)), entrypoint, cmd) == runs


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("", 15),
        ("SIGINT", 2),
        ("int", 2),
        ("1", 1),
        ("2", 2),
        ("64", 64),
        ("65", 15),
        ("0", 15),
        ("SIGNONSENSE", 15),
        ("SIGRTMIN+3", 37),
        ("sigrtmin", 34),
        ("RTMAX-14", 50),
        ("RTMAX", 64),
        ("SIGRTMAX+1", 15),
        ("SIGRTMIN-1", 15),
        ("SIG_DFL", 15),
    ],
)
def test_stop_signals(name: str, number: int) -> None:
    assert signal_number(name) == number


def test_a_machine_id_is_the_instances_own() -> None:
    assert machine_id("a") == machine_id("a") != machine_id("b")
    assert len(machine_id("a")) == 32 and int(machine_id("a"), 16) >= 0


@pytest.mark.parametrize(
    ("code", "signal", "oom", "text"),
    [
        (0, 0, False, "exited with code 0"),
        (7, 0, False, "exited with code 7"),
        (126, 0, False, "command cannot be executed"),
        (127, 0, False, "command not found"),
        (137, 9, False, "killed by signal 9 (SIGKILL)"),
        (137, 9, True, "killed by signal 9 (SIGKILL) - OOM"),
        (165, 37, False, "killed by signal 37 (SIGRTMIN+3)"),
        (228, 100, False, "killed by signal 100 (unknown signal)"),
    ],
)
def test_exit_messages_are_worded_as_in_the_contract(code: int, signal: int, oom: bool, text: str) -> None:
    assert describe_exit(code, signal, out_of_memory=oom) == text


class Live:
    """What a watched VM knows of its workload's end."""

    def __init__(self, exited: Exited | None = None, fatal: Fatal | None = None) -> None:
        self.exited, self.fatal = exited, fatal


KILLED = Exited(137, 9, oom=True)
DIED = "killed by signal 9 (SIGKILL) - OOM"


@pytest.mark.parametrize(
    ("live", "ended", "written", "code", "message"),
    [
        (None, None, None, None, "stopped"),
        (Live(), None, None, None, "stopped"),
        (Live(KILLED), VmmExit(ExitReason.POWEROFF), None, 137, DIED),
        (Live(KILLED), None, Exited(0), 137, DIED),
        (Live(), VmmExit(ExitReason.POWEROFF), KILLED, 137, DIED),
        (None, VmmExit(ExitReason.KILLED), Exited(3), 3, "exited with code 3"),
        (Live(fatal=Fatal("no root")), None, Fatal("other"), 127, "no root"),
        (Live(), None, Fatal("no root"), 127, "no root"),
        (None, VmmExit(ExitReason.RESET), Fatal("no root"), 127, "no root"),
        (Live(Exited(1), Fatal("no root")), None, None, 1, "exited with code 1: no root"),
        (Live(Exited(1)), None, Fatal("no root"), 1, "exited with code 1: no root"),
        (None, VmmExit(ExitReason.POWEROFF), None, None, "the guest powered off"),
        (None, VmmExit(ExitReason.POWEROFF, "what QEMU says"), None, None, "the guest powered off"),
        (None, VmmExit(ExitReason.POWEROFF, HALTED), None, None, "the guest halted"),
        (None, VmmExit(ExitReason.RESET), None, None, "the guest rebooted or its kernel panicked"),
        (None, VmmExit(ExitReason.KILLED), None, None, "the VMM was killed"),
        (None, VmmExit(ExitReason.KILLED, "out of memory"), None, None, "out of memory"),
        (None, VmmExit(ExitReason.FAILED), None, None, "the VMM failed"),
        (None, VmmExit(ExitReason.FAILED, "no KVM"), None, None, "no KVM"),
    ],
)
def test_how_a_workload_ended_is_known_from_the_best_source(
    live: Live | None, ended: VmmExit | None, written: Exited | Fatal | None, code: int | None, message: str
) -> None:
    """The agent, else its outcome on the boot disk, else the VMM."""
    assert exit_of(cast("LiveVm | None", live), ended, written) == (code, message)
