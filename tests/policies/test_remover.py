"""Instances that are deleted when they have ended, in memory, across servers."""

from __future__ import annotations

import pytest
import trio
from trio.abc import Clock

from hypeman.errors import HypemanError, InvalidRequest
from hypeman.hypervisor.interface import VmConfig
from hypeman.instances.model.types import (
    ForkInstanceRequest,
    InstanceState,
    NetworkRequest,
    RestartMode,
    RestartPolicy,
    StartInstanceRequest,
    TargetState,
    UpdateInstanceRequest,
)
from tests.fakes.fake_vmm import FakeVmm
from tests.instances.fake_world import request
from tests.policies.keeping import ClockedLab, Kept, keeping

NO_NETWORK = NetworkRequest(enabled=False)


async def make(kept: Kept, name: str = "one") -> None:
    await kept.instances.create(request(name, auto_remove=True, network=NO_NETWORK))
    await kept.until_state(InstanceState.RUNNING, name)


def there(kept: Kept) -> list[str]:
    return sorted(record.name for record in kept.instances.board.records())


async def test_it_is_deleted_soon_after_its_end(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.instances.create(request("kept", network=NO_NETWORK))
        await kept.until_state(InstanceState.RUNNING, "kept")
        await kept.end(7)
        assert (await kept.instances.get("one")).exit_code == 7, "who has waited for it reads how it ended"
        await kept.end(0, "kept")
        await kept.until(lambda: there(kept) == ["kept"], 10)
        await kept.sleep(100)
        assert there(kept) == ["kept"]


async def test_a_stop_deletes_it_as_well(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.instances.stop("one")
        await kept.until(lambda: there(kept) == [], 10)


async def test_who_follows_its_log_is_waited_for(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        async with kept.policies.using("one", "logs"):
            await kept.end(0)
            await kept.sleep(20)
            assert there(kept) == ["one"]
        await kept.until(lambda: there(kept) == [], 5)
        await make(kept, "two")
        async with kept.policies.using("two", "logs"):
            await kept.end(0, "two")
            await kept.until(lambda: there(kept) == [], 60)


async def test_the_next_server_deletes_it(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.end(0)
    async with keeping(lab) as kept:
        await kept.until(lambda: there(kept) == [], 10)


async def test_a_deletion_that_fails_is_tried_again(
    lab: ClockedLab, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        tries = []
        delete = kept.instances.delete_ended

        async def fails_once(instance_id: str, boots: int) -> None:
            tries.append(instance_id)
            if len(tries) == 1:
                raise HypemanError("the disk is full")
            await delete(instance_id, boots)

        monkeypatch.setattr(kept.instances, "delete_ended", fails_once)
        await kept.end(0)
        await kept.until(lambda: there(kept) == [], 100)
        assert len(tries) == 2


async def test_one_that_is_started_again_stays(lab: ClockedLab, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `restart` does: the start of its VMM takes longer than an ended instance is kept."""
    async with keeping(lab) as kept, trio.open_nursery() as nursery:
        await make(kept)
        await kept.instances.stop("one")
        launch = lab.driver.launch

        async def launch_late(config: VmConfig) -> FakeVmm:
            await trio.sleep(20)
            return await launch(config)

        monkeypatch.setattr(lab.driver, "launch", launch_late)
        nursery.start_soon(kept.instances.start, "one", StartInstanceRequest())
        await kept.sleep(60)
        assert kept.record().state is InstanceState.RUNNING
        await kept.end(0)
        await kept.until(lambda: there(kept) == [], 10)


async def test_it_has_no_restart_policy_and_its_forks_stay(lab: ClockedLab, clock: Clock) -> None:
    always = RestartPolicy(policy=RestartMode.ALWAYS)
    async with keeping(lab) as kept:
        with pytest.raises(InvalidRequest, match="exclude each other"):
            await kept.instances.create(request("no", auto_remove=True, restart_policy=always, network=NO_NETWORK))
        await make(kept)
        fork = ForkInstanceRequest(name="fork", from_running=True, target_state=TargetState.STOPPED)
        await kept.instances.fork("one", fork)
        await kept.instances.update("one", UpdateInstanceRequest(restart_policy=always))
        await kept.end(1)
        await kept.until_state(InstanceState.RUNNING, boots=2)
        assert there(kept) == ["fork", "one"]
