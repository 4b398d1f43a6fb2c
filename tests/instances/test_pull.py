"""A create whose image must be pulled first: recorded at once, answered when it boots, resumed, cancelled."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio

from hypeman.errors import InvalidState, NameConflict, NotFound, StoreError
from hypeman.instances.model.types import InstanceState
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.resources.accounting import totals
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.store import Store
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld
from tests.instances.fake_world import Lab, request
from tests.instances.situations import clean_up, rows, settled
from tests.instances.test_trouble import appeared
from tests.instances.test_unknown import is_unknown

SECRET = "a secret that is long enough for HS256"


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    """The image is missing, and its pull lasts until ``lab.images.pulled`` is set."""
    lab = Lab(store, paths)
    lab.images.missing = True
    lab.images.pulled = trio.Event()
    return lab


async def pulling(lab: Lab, instances: Instances, name: str = "one") -> None:
    """Wait until the instance waits for its image."""
    await appeared(instances, name)
    with trio.fail_after(5):
        while not lab.images.pulls:
            await trio.lowlevel.checkpoint()


async def test_it_is_recorded_before_the_pull(lab: Lab) -> None:
    async with lab.running() as instances, trio.open_nursery() as nursery:
        nursery.start_soon(instances.create, request("one"))
        await pulling(lab, instances)
        seen = await instances.get("one")
        assert (seen.state, seen.current_phase) == (InstanceState.CREATED, "pulling")
        assert lab.store.read(totals).memory > 0, "it has its part of the host"
        with pytest.raises(NameConflict):
            await instances.create(request("one"))
        assert lab.world_as_text() == ""
        lab.images.pulled.set()
        assert await settled(instances, "one") == "Running"
        phases = (await instances.get("one")).phase_durations_ms
        assert isinstance(phases, dict) and list(phases)[:3] == ["pulling", "created", "initializing"]
        await clean_up(lab, instances)


async def test_past_the_time_limit_the_answer_is_true(lab: Lab, tmp_path: Path) -> None:
    """504 says that the work continues, and it does."""
    async with lab.running() as instances:
        fakes: Any = FakeWorld(tmp_path).services
        services = dataclasses.replace(fakes, instances=instances)
        client = build_app(services, ServerSettings(SECRET, request_timeout=0.05)).test_client()
        headers = {"Authorization": f"Bearer {mint(SECRET, subject='tester')}"}
        body = {"name": "one", "image": "busybox", "size": "64MB", "overlay_size": "16MB"}
        answer = await client.post("/instances", json=body, headers=headers)
        assert answer.status_code == 504
        shown = await (await client.get("/instances/one", headers=headers)).get_json()
        assert (shown["state"], shown["current_phase"]) == ("Created", "pulling")
        lab.images.pulled.set()
        assert await settled(instances, "one") == "Running"
        await clean_up(lab, instances)


async def test_a_killed_server_continues(lab: Lab) -> None:
    """Its start does not wait for the pull."""
    async with lab.running() as instances, trio.open_nursery() as nursery:
        nursery.start_soon(instances.create, request("one"))
        await pulling(lab, instances)
        created_at = instances.board.find("one").created_at
        nursery.cancel_scope.cancel()
    async with lab.running() as instances:
        seen = await instances.get("one")
        assert (seen.state, seen.current_phase, seen.created_at) == (InstanceState.CREATED, "pulling", created_at)
        lab.images.pulled.set()
        assert await settled(instances, "one") == "Running"
        assert lab.images.pulls == 2
        await clean_up(lab, instances)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_delete_cancels_it(lab: Lab, restarted: bool) -> None:
    refused: list[InvalidState] = []

    async def create(instances: Instances) -> None:
        try:
            await instances.create(request("one"))
        except InvalidState as error:
            refused.append(error)

    async with lab.running() as instances, trio.open_nursery() as nursery:
        nursery.start_soon(create, instances)
        await pulling(lab, instances)
        if not restarted:
            with trio.fail_after(5):
                await instances.delete("one")
        else:
            nursery.cancel_scope.cancel()
    if restarted:
        async with lab.running() as instances:
            with trio.fail_after(5):
                await instances.delete("one")
    else:
        assert [error.status for error in refused] == [409]
    assert lab.world_as_text() == "" and rows(lab.store).count("\n") == 0


async def test_it_expires_while_it_is_pulled(lab: Lab) -> None:
    async with lab.running() as instances:
        instances._now = lambda: datetime.now(UTC) - timedelta(seconds=30)
        with pytest.raises((InvalidState, NotFound)), trio.fail_after(5):
            await instances.create(request("one", ttl="1s"))
        with trio.fail_after(5):
            while list(instances.board.records()):
                await trio.sleep(0.01)
    assert rows(lab.store).count("\n") == 0


async def test_a_pull_that_fails_leaves_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(name: str, platform: str | None = None) -> Any:
        raise NotFound("there is no image busybox")

    monkeypatch.setattr(lab.images, "wait_ready", refuse)
    async with lab.running() as instances:
        with pytest.raises(NotFound, match="busybox"):
            await instances.create(request("one"))
        assert not list(instances.board.records())
    assert lab.world_as_text() == "" and rows(lab.store).count("\n") == 0


async def test_what_could_not_be_removed_after_that_is_later(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is full at that moment: Unknown, which says why, until it can be removed."""

    async def refuse(name: str, platform: str | None = None) -> Any:
        monkeypatch.setattr(instances.ledger, "remove", full)
        raise NotFound("there is no image busybox")

    async def full(record: Any) -> None:
        monkeypatch.undo()
        raise StoreError("the disk is full")

    monkeypatch.setattr(lab.images, "wait_ready", refuse)
    async with lab.running() as instances:
        with pytest.raises(NotFound):
            await instances.create(request("one"))
        await is_unknown(instances, "the disk is full")
        with trio.fail_after(10):
            await instances.board.wait_deleted(instances.board.find("one").id)
    assert rows(lab.store).count("\n") == 0
