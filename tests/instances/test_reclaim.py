"""Memory that guests lend to the host: who is asked for how much, and who has it back when."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hypeman.config import ReclaimConfig
from hypeman.errors import InvalidRequest
from hypeman.hypervisor.interface import VmmBroken
from hypeman.instances import reclaim
from hypeman.instances.model.types import ForkInstanceRequest, StandbyInstanceRequest
from hypeman.instances.reclaim import shares
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.resources.types import MemoryReclaimRequest
from hypeman.store import Store
from hypeman.units import MIB
from tests.instances.fake_world import Lab, request
from tests.instances.situations import settled

GIB = 1 << 30


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


def asked(size: int, **more: object) -> MemoryReclaimRequest:
    return msgspec.convert({"reclaim_bytes": size, **more}, MemoryReclaimRequest)


def lent(lab: Lab, instances: Instances, name: str) -> int:
    """What was set at the VM."""
    return lab.machine.of(instances.board.find(name).id).memory.lent


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.001)


async def one(lab: Lab, instances: Instances) -> None:
    await instances.create(request("one", size="2GB"))
    assert await settled(instances, "one") == "Running"


async def two(lab: Lab, instances: Instances) -> None:
    for name, size in (("large", "4GB"), ("small", "1GB")):
        await instances.create(request(name, size=size))
        assert await settled(instances, name) == "Running"


@given(st.integers(0, 1 << 40), st.lists(st.integers(0, 1 << 14).map(lambda mib: mib * MIB), max_size=20))
def test_shares(wanted: int, spare: list[int]) -> None:
    parts = shares(wanted, spare)
    assert all(0 <= part <= each and part % MIB == 0 for part, each in zip(parts, spare, strict=True))
    assert wanted - MIB < sum(parts) <= wanted or parts == spare
    in_proportion = [each * sum(parts) / max(1, sum(spare)) for each in spare]
    assert all(abs(part - fair) <= MIB for part, fair in zip(parts, in_proportion, strict=True))


async def test_all_lend_in_proportion_to_what_they_can_spare(lab: Lab) -> None:
    async with lab.running() as instances:
        await two(lab, instances)
        answer = await instances.reclaim_memory(asked(GIB, reason="a large build"))
        large, small = answer.actions
        assert (large.instance_name, small.instance_name) == ("large", "small")
        assert large.protected_floor_bytes == 2 * GIB and small.protected_floor_bytes == GIB // 2
        assert lent(lab, instances, "large") == large.applied_reclaim_bytes == 820 * MIB
        assert lent(lab, instances, "small") == small.applied_reclaim_bytes == 204 * MIB
        assert answer.planned_reclaim_bytes == answer.applied_reclaim_bytes == answer.requested_reclaim_bytes == GIB
        assert large.target_guest_memory_bytes == large.planned_target_guest_memory_bytes == 4 * GIB - 820 * MIB
        assert large.previous_target_guest_memory_bytes == 4 * GIB
        assert answer.hold_until and {large.status, small.status} == {"applied"}
        again = await instances.reclaim_memory(asked(GIB))
        assert {action.status for action in again.actions} == {"unchanged"}
        assert again.actions[0].previous_target_guest_memory_bytes == 4 * GIB - 820 * MIB


async def test_no_guest_goes_below_the_floor(lab: Lab) -> None:
    async with lab.running() as instances:
        await two(lab, instances)
        answer = await instances.reclaim_memory(asked(100 * GIB))
        assert answer.requested_reclaim_bytes == 100 * GIB
        assert answer.applied_reclaim_bytes == 2 * GIB + GIB // 2
        assert all(action.target_guest_memory_bytes == action.protected_floor_bytes for action in answer.actions)


async def test_zero_gives_all_back(lab: Lab) -> None:
    async with lab.running() as instances:
        await two(lab, instances)
        await instances.reclaim_memory(asked(GIB))
        answer = await instances.reclaim_memory(asked(0))
        assert answer.applied_reclaim_bytes == 0 and answer.hold_until is msgspec.UNSET
        assert lent(lab, instances, "large") == lent(lab, instances, "small") == 0


async def test_memory_that_was_not_returned_is_requested_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "PAUSE", 0.01)
    async with lab.running() as instances:
        await one(lab, instances)
        await instances.reclaim_memory(asked(GIB))
        lab.driver.fail("set_balloon", VmmBroken("no word from it"))
        answer = await instances.reclaim_memory(asked(0))
        assert [action.status for action in answer.actions] == ["error"]
        await until(lambda: lent(lab, instances, "one") == 0)


async def test_all_is_given_back_when_the_time_is_over(lab: Lab) -> None:
    async with lab.running() as instances:
        await two(lab, instances)
        answer = await instances.reclaim_memory(asked(GIB, hold_for="20ms"))
        assert answer.applied_reclaim_bytes == GIB
        await until(lambda: lent(lab, instances, "large") == lent(lab, instances, "small") == 0)


async def test_one_that_does_not_take_it_back_is_asked_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "PAUSE", 0.01)
    async with lab.running() as instances:
        await one(lab, instances)
        await instances.reclaim_memory(asked(GIB, hold_for="20ms"))
        lab.driver.fail("set_balloon", VmmBroken("no word from it"))
        await until(lambda: lent(lab, instances, "one") == 0)


async def test_a_dry_run_changes_nothing(lab: Lab) -> None:
    async with lab.running() as instances:
        await two(lab, instances)
        answer = await instances.reclaim_memory(asked(GIB, dry_run=True))
        assert answer.planned_reclaim_bytes == GIB and answer.applied_reclaim_bytes == 0
        assert {action.status for action in answer.actions} == {"planned"}
        assert answer.actions[0].planned_target_guest_memory_bytes == 4 * GIB - 820 * MIB
        assert lent(lab, instances, "large") == 0 and answer.hold_until is msgspec.UNSET


async def test_a_guest_that_fails_is_reported_and_the_others_lend(lab: Lab) -> None:
    async with lab.running() as instances:
        await two(lab, instances)
        lab.driver.fail("set_balloon", VmmBroken("no word from it"))
        answer = await instances.reclaim_memory(asked(GIB))
        failed = [action for action in answer.actions if action.status == "error"]
        assert len(failed) == 1 and failed[0].error == "no word from it" and failed[0].applied_reclaim_bytes == 0
        assert answer.applied_reclaim_bytes == GIB - (4 * GIB - failed[0].planned_target_guest_memory_bytes) or (
            answer.applied_reclaim_bytes == GIB - (GIB - failed[0].planned_target_guest_memory_bytes)
        )


async def test_a_guest_that_cannot_lend_is_reported(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lab.running() as instances:
        await one(lab, instances)
        monkeypatch.setattr(lab.driver, "capabilities", msgspec.structs.replace(lab.driver.capabilities, balloon=False))
        answer = await instances.reclaim_memory(asked(GIB))
        assert [action.status for action in answer.actions] == ["unsupported"]
        assert answer.planned_reclaim_bytes == 0


async def test_who_sleeps_is_not_asked(lab: Lab) -> None:
    async with lab.running() as instances:
        await one(lab, instances)
        await instances.standby("one", StandbyInstanceRequest())
        assert (await instances.reclaim_memory(asked(GIB))).actions == ()


async def test_no_saved_state_remembers_a_loan(lab: Lab) -> None:
    async with lab.running() as instances:
        await two(lab, instances)
        await instances.reclaim_memory(asked(GIB))
        await instances.standby("large", StandbyInstanceRequest())
        await instances.restore("large")
        await instances.fork("small", ForkInstanceRequest(name="fork", from_running=True))
        assert [lent(lab, instances, name) for name in ("large", "small", "fork")] == [0, 0, 0]
        answer = await instances.reclaim_memory(asked(GIB))  # and may be asked again
        assert answer.applied_reclaim_bytes == GIB


async def test_one_that_is_being_saved_is_left_alone(lab: Lab) -> None:
    async with lab.running() as instances:
        await one(lab, instances)
        live = instances.machine.context.live[instances.board.find("one").id]
        async with live.without_loan():
            answer = await instances.reclaim_memory(asked(GIB))
        assert [action.status for action in answer.actions] == ["error"]
        assert "saved" in str(answer.actions[0].error) and lent(lab, instances, "one") == 0


async def test_the_next_server_has_everything_given_back(lab: Lab) -> None:
    async with lab.running() as instances:
        await one(lab, instances)
        await instances.reclaim_memory(asked(256 * MIB, hold_for="1h"))
        assert lent(lab, instances, "one") == 256 * MIB
        lab.crash_at(0)
    async with lab.running() as instances:
        assert lent(lab, instances, "one") == 0


async def test_a_loan_that_an_earlier_server_made_ends_before_the_vm_is_saved(lab: Lab) -> None:
    async with lab.running() as instances:
        await one(lab, instances)
        await instances.reclaim_memory(asked(256 * MIB, hold_for="1h"))
        lab.crash_at(0)
    for call in (1, 2):
        lab.driver.fail("set_balloon", VmmBroken("no word from it"), call=call)
    async with lab.running() as instances:
        await until(lambda: sum(entry.startswith("set_balloon") for entry in lab.machine.journal) == 3)
        assert lent(lab, instances, "one") == 256 * MIB
        await instances.standby("one", StandbyInstanceRequest())
        await instances.restore("one")
        assert lent(lab, instances, "one") == 0


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"reclaim_bytes": -1}, "bad_request"),
        ({"reclaim_bytes": 1, "hold_for": "2h"}, "bad_request"),
        ({"reclaim_bytes": 1, "hold_for": "soon"}, "bad_request"),
    ],
)
async def test_wrong_orders(lab: Lab, wrong: dict[str, object], code: str) -> None:
    async with lab.running() as instances:
        with pytest.raises(InvalidRequest) as refused:
            await instances.reclaim_memory(msgspec.convert(wrong, MemoryReclaimRequest))
        assert refused.value.code == code


async def test_it_can_be_switched_off(lab: Lab) -> None:
    async with lab.running() as instances:
        instances._reclaim._config = ReclaimConfig(enabled=False)
        with pytest.raises(InvalidRequest) as refused:
            await instances.reclaim_memory(asked(1))
        assert refused.value.code == "feature_disabled"
