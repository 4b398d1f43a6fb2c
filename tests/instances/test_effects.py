"""The table of effects: each step has its own, and only Reversible ones have an undo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

from hypeman.instances.machine.effects import Effects
from hypeman.instances.model import steps
from hypeman.instances.model.steps import Irreversible, Reversible, Step
from hypeman.paths import Paths
from hypeman.store import Store
from tests.instances.fake_world import Lab
from tests.instances.situations import clean_up, stopped


def effects() -> Effects:
    parts: dict[str, Any] = {
        name: Mock() for name in ("disks", "network", "devices", "vmms", "guests", "captures")
    }  # only their methods are named, none is called
    return Effects(**parts)


def test_every_step_has_its_effects() -> None:
    table = effects()
    assert set(table.reversible) == set(get_args(Reversible))
    assert set(table.irreversible) == set(get_args(Irreversible))


def test_every_kind_of_step_is_in_a_plan() -> None:
    golden = (Path(__file__).parents[1] / "golden" / "plans.txt").read_text()
    unplanned = {step.__name__ for step in get_args(Step) if f"{step.__name__}(" not in golden}
    assert not unplanned


def test_steps_are_data() -> None:
    for step in get_args(Step):
        own = {name for name in vars(step) if not name.startswith("_")} - set(step.__struct_fields__)
        assert not own, f"{step.__name__} has {own}"


async def test_an_undo_of_nothing_is_a_no_op(store: Store, paths: Paths) -> None:
    lab = Lab(store, paths)
    async with lab.running() as instances:
        await stopped(lab, instances)
        record = instances.board.find("one")
        before = lab.world_as_text()
        for step in (
            steps.SetEgress(record.id),
            steps.AttachNetwork(record.id),
            steps.BindDevices(record.id),
            steps.LaunchVmm(record.id),
            steps.PauseVm(record.id),
            steps.GoOn(record.id),
            steps.SaveCapture(record.id, "none"),
            steps.PlugVolume(record.id, "vol", "/data", False, 1),
            steps.StageDisks(record.id, "/none"),
            steps.PrepareRun(record.id),
        ):
            await instances.machine.undo(step)
        assert lab.world_as_text() == before
        await clean_up(lab, instances)
