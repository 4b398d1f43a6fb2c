"""Checks of instances in memory on a clock of their own: when they are made, and what they lead to."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.abc import Clock

from hypeman.instances.model.types import (
    HealthCheck,
    HealthCheckType,
    HealthState,
    InstanceState,
    RestartMode,
    RestartPolicy,
    RestartStatus,
    StandbyInstanceRequest,
    TcpHealthCheck,
    UpdateInstanceRequest,
)
from hypeman.policies.probes import CheckFailed
from tests.instances.fake_world import request
from tests.policies.keeping import ClockedLab, Kept, keeping

RUNNING = InstanceState.RUNNING
CHECK = HealthCheck(type=HealthCheckType.TCP, tcp=TcpHealthCheck(port=80), start_period="0s")


class Answers:
    """In place of the probes."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.hang = False
        self.asked = 0
        self.at_once = 0
        self.most = 0

    async def check(self, *_: object, **__: object) -> None:
        self.asked += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await trio.lowlevel.checkpoint()
            if self.hang:
                await trio.sleep_forever()
        finally:
            self.at_once -= 1
        if self.error is not None:
            raise CheckFailed(self.error)


async def health(kept: Kept) -> Any:
    return (await kept.instances.get("one")).health_status


async def make(kept: Kept, **changes: Any) -> Answers:
    answers = Answers()
    kept.policies.checker._probes = answers  # type: ignore[assignment]
    await kept.instances.create(request("one", health_check=CHECK, **changes))
    await kept.until_state(RUNNING)
    return answers


async def test_it_is_asked_every_interval(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        answers = await make(kept)
        assert (await health(kept)).status is HealthState.STARTING
        await kept.sleep(1)
        assert (await health(kept)).status is HealthState.HEALTHY and answers.asked == 1
        await kept.sleep(100)
        assert answers.asked == 11
        answers.error = "refused"
        await kept.sleep(30)
        shown = await health(kept)
        assert (shown.status, shown.consecutive_failures, shown.last_error) == (HealthState.UNHEALTHY, 3, "refused")
        assert b'"unhealthy"' in await kept.instances.list(None, {})
        assert kept.policies.checker.counts()[("unhealthy",)] == 1
        assert kept.record().state is RUNNING, "without a restart policy nothing happens"
        assert kept.events("health_changed", "restarting") == [
            ("health_changed", {"from": "starting", "to": "healthy"}),
            ("health_changed", {"from": "healthy", "to": "unhealthy", "error": "refused"}),
        ]


async def test_no_answer_is_a_failure(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        answers = await make(kept)
        answers.hang = True
        await kept.sleep(31)
        shown = await health(kept)
        assert shown.status is HealthState.UNHEALTHY and shown.last_error == "no answer within 2 s"
        assert answers.at_once == 0


async def test_only_running_instances_are_asked(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        answers = await make(kept)
        await kept.sleep(1)
        await kept.instances.standby("one", StandbyInstanceRequest())
        before = answers.asked
        await kept.sleep(100)
        assert answers.asked == before and kept.record().state is InstanceState.STANDBY
        shown = await health(kept)
        assert shown.status is HealthState.UNKNOWN and shown.last_success_at is not None
        await kept.instances.restore("one")
        await kept.sleep(1)
        assert (await health(kept)).status is HealthState.HEALTHY
        await kept.instances.update("one", UpdateInstanceRequest(health_check=HealthCheck(type=HealthCheckType.NONE)))
        await kept.quiet()
        before = answers.asked
        await kept.sleep(50)
        assert answers.asked == before and (await health(kept)).status is HealthState.DISABLED


@pytest.mark.parametrize("held", [True, False])
async def test_a_failure_while_the_server_pauses_it_does_not_count(lab: ClockedLab, clock: Clock, held: bool) -> None:
    async with keeping(lab) as kept:
        answers = await make(kept)
        await kept.sleep(1)
        answers.error = "paused"
        lab.guests[kept.record().id].held = held
        await kept.sleep(60)
        assert ((await health(kept)).status is HealthState.HEALTHY) is held


async def test_an_unhealthy_instance_is_started_again(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        answers = await make(kept, restart_policy=RestartPolicy(policy=RestartMode.ON_FAILURE))
        answers.error = "refused"
        await kept.until_state(RUNNING, boots=2)
        shown = (await kept.instances.get("one")).restart_status
        assert isinstance(shown, RestartStatus)
        assert shown.last_reason == "health_check_failed" and shown.attempts == 1
        answers.error = None
        await kept.sleep(10)
        assert (await health(kept)).status is HealthState.HEALTHY
        await kept.sleep(100)
        assert kept.record().boots == 2


async def test_checks_in_progress_are_bounded(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        answers = await make(kept)
        kept.policies.checker._limiter.total_tokens = 2
        for name in ("two", "three", "four"):
            await kept.instances.create(request(name, health_check=CHECK))
        answers.hang = True
        await kept.sleep(30)
        assert answers.most == 2
