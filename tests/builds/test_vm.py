"""What the machine of a build does about the instance and the volume that it wants, on fakes of these."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio.testing

from hypeman.builds.request import Borrowed, BuildSpec
from hypeman.builds.types import Builder, BuilderStatus
from hypeman.builds.vm import VmSettings, VmWorker
from hypeman.builds.work import BuildFailed, Job, Report
from hypeman.errors import AlreadyExists, Conflict, HypemanError, NotFound

BUILDER = Builder(id="b", disk_size_gb=1, status=BuilderStatus.READY, created_at=datetime(2026, 1, 1, tzinfo=UTC))


class FakeNeeds:
    """Instances and volumes; ``create`` of an instance fails with ``errors``, then stops."""

    def __init__(self, *errors: HypemanError) -> None:
        self.errors = list(errors)
        self.said: list[str] = []

    async def list(self, state: object = None, tags: object = None) -> Any:
        return []

    async def create(self, request: object) -> Any:
        await trio.lowlevel.checkpoint()
        if hasattr(request, "image") and self.errors:
            raise self.errors.pop(0)
        return SimpleNamespace(id="vm")

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        raise NotFound(ref)

    async def wait_state(self, *_: object) -> Any:
        return SimpleNamespace(state=SimpleNamespace(value="Stopped"), state_error="no room")

    def log(self, text: str) -> None:
        self.said.append(text)

    async def vm(self, instance_id: str) -> None: ...


async def build(needs: FakeNeeds) -> None:
    worker = VmWorker(
        guests=cast(Any, needs),
        volumes=needs,
        images=cast(Any, needs),
        registry=cast(Any, needs),
        settings=VmSettings("i"),
    )
    await worker.build(Job("one", BuildSpec(), (), Path("/"), Borrowed(), {}, BUILDER, ""), cast(Report, needs))


async def test_the_last_build_may_hold_the_cache_a_moment_longer(autojump_clock: trio.testing.MockClock) -> None:
    needs = FakeNeeds(*[Conflict("volume 'builder-b' is attached read-write to instance x")] * 20)
    with pytest.raises(BuildFailed, match="the VM did not start"):
        await build(needs)
    assert [line for line in needs.said if "waiting" in line] == [
        "waiting for the builder's cache: volume 'builder-b' is attached read-write to instance x"
    ]


@pytest.mark.parametrize("error", [AlreadyExists("a name"), Conflict("held")])
async def test_what_does_not_pass_fails(error: HypemanError, autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(type(error)):
        await build(FakeNeeds(*[error] * 1000))
    assert trio.current_time() < 100
