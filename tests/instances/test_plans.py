"""The steps of every plan and their order, as text: a step that moves is seen in the difference."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from hypeman.egress.types import EgressEnforcementMode
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.model import plan
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.model.steps import Step
from hypeman.instances.model.types import InstanceState

GOLDEN = Path(__file__).parents[1] / "golden" / "plans.txt"
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def record(*, everything: bool) -> InstanceRecord:
    """With network, egress and a device, or with none of them."""
    spec = InstanceSpec(
        image="i", platform="linux/amd64", hypervisor=HypervisorKind.QEMU, vcpus=1, memory_bytes=1 << 30,
        hotplug_bytes=0, overlay_bytes=1 << 30, network=everything,
        egress=EgressEnforcementMode.ALL if everything else None, devices=("d",) if everything else (),
    )  # fmt: skip
    return InstanceRecord(
        id="abc", name="a", number=1, spec=spec, digest="d", state=InstanceState.STOPPED, created_at=NOW,
        phases=Phases("stopped", NOW),
    )  # fmt: skip


def plans(one: InstanceRecord) -> dict[str, tuple[Step, ...]]:
    return {
        "create": plan.plan_create(one),
        "start": plan.plan_start(one),
        "restore": plan.plan_restore(one, "c", keep=False),
        "fill": plan.plan_fill(one, "/s", "c"),
        "awaken": plan.plan_awaken(one, "c", fresh=True),
        "stop": plan.plan_stop(one, grace=5),
        "park": plan.plan_park(one),
        "take down": plan.plan_take_down(one),
        "delete": plan.plan_delete(one),
        "free": plan.plan_free("c", None, "d"),
        "standby": plan.plan_standby(one, "c"),
        "copy out, stopped": plan.plan_copy_out(one, "/t", capture=None, running=False),
        "copy out, running": plan.plan_copy_out(one, "/t", capture=None, running=True),
        "copy out, running, with memory": plan.plan_copy_out(one, "/t", capture="c", running=True),
        "adopt disks of a snapshot": plan.plan_adopt_disks(one, "/s", shared=True),
        "adopt disks of one's own": plan.plan_adopt_disks(one, "/s", shared=False),
        "attach": (plan.plan_attach(one, "v", "/data", readonly=True, port=2),),
        "stage": plan.plan_stage(one, "/s"),
        "swap": plan.plan_swap(one),
    }


def render() -> str:
    lines: list[str] = []
    for title, everything in (("network, egress and a device", True), ("none of them", False)):
        for name, steps in plans(record(everything=everything)).items():
            lines += [f"{name} ({title})", *(f"    {step}" for step in steps), ""]
    return "\n".join(lines)


def test_golden_copy() -> None:
    """Look at the difference, then write the file again: ``python -m tests.instances.test_plans``."""
    assert render() == GOLDEN.read_text()


def test_every_plan_has_a_golden_text() -> None:
    names = {name for name in vars(plan) if name.startswith("plan_")}
    source = Path(__file__).read_text()
    assert {name for name in names if f"plan.{name}(" not in source} == set()


@pytest.mark.parametrize("name", ["create", "start", "restore", "fill"])
def test_the_egress_policy_is_in_force_before_the_network_opens(name: str) -> None:
    """Otherwise a guest could send packets past its policy for a moment; a stop takes them down in reverse."""
    steps = [type(step).__name__ for step in plans(record(everything=True))[name]]
    assert steps.index("SetEgress") < steps.index("AttachNetwork")


if __name__ == "__main__":
    GOLDEN.write_text(render())
