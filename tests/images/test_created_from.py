"""Instances created from an image that a real service pulls from a registry, on fake VMMs."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from hypeman.errors import HypemanError, InvalidState, NotFound
from hypeman.images.records import HOLDERS, IMAGES
from hypeman.instances.model.types import InstanceState
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.store import Store
from tests.images.conftest import Start
from tests.images.faults import FaultyRegistry, Request, Response
from tests.images.layout import ImageFiles, entry, tar
from tests.instances.fake_world import Lab, request
from tests.instances.situations import settled
from tests.instances.test_trouble import appeared

FILES = ImageFiles([tar(entry("one", data=b"1" * 9000))], config={"Entrypoint": ["/one"]})


def hold_blobs(asked: Request) -> Response | None:
    return Response(200, {}, b"x" * 100, cut=0, then="stall") if "/blobs/" in asked.path else None


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


async def create(instances: Instances, image: str, failed: list[HypemanError]) -> None:
    try:
        await instances.create(request("one", image=image))
    except HypemanError as error:
        failed.append(error)


async def pulling(instances: Instances, registry: FaultyRegistry) -> None:
    await appeared(instances, "one")
    with trio.fail_after(30):
        while not registry.blob_requests():
            await trio.sleep(0.01)
    seen = await instances.get("one")
    assert (seen.state, seen.current_phase) == (InstanceState.CREATED, "pulling")


async def test_killed_in_the_middle_of_the_pull(lab: Lab, registry: FaultyRegistry, make_images: Start) -> None:
    """The next server's services go on where they were, and the instance boots from the pinned image."""
    registry.serve("one", FILES)
    registry.rules.append(hold_blobs)
    image, settings = f"{registry.host}/one", {"insecure_registries": (registry.host,)}
    async with trio.open_nursery() as server:
        lab.images = await make_images(nursery=server, **settings)  # type: ignore[assignment]
        async with lab.running() as instances, trio.open_nursery() as callers:
            callers.start_soon(create, instances, image, [])
            await pulling(instances, registry)
            callers.cancel_scope.cancel()
        server.cancel_scope.cancel()
    lab.images = await make_images(**settings)  # type: ignore[assignment]
    async with lab.running() as instances:
        assert (await instances.get("one")).current_phase == "pulling"
        registry.rules.clear()
        with trio.fail_after(60):
            assert await settled(instances, "one") == "Running"
        record = instances.board.find("one")
        held = lab.store.read(lambda txn: txn.get(HOLDERS, record.id))
        assert held is not None and held.digest == record.digest == FILES.digest
        await instances.delete("one")
    assert not lab.store.read(lambda txn: list(txn.keys(HOLDERS)))


async def test_a_delete_stops_the_pull(lab: Lab, registry: FaultyRegistry, make_images: Start) -> None:
    registry.serve("one", FILES)
    registry.rules.append(hold_blobs)
    lab.images = images = await make_images(insecure_registries=(registry.host,))  # type: ignore[assignment]
    failed: list[HypemanError] = []
    async with lab.running() as instances, trio.open_nursery() as callers:
        callers.start_soon(create, instances, f"{registry.host}/one", failed)
        await pulling(instances, registry)
        with trio.fail_after(30):
            await instances.delete("one")
    assert [type(error) for error in failed] == [InvalidState]
    pulls: Any = images
    assert pulls.statistics()["active"] == 0
    assert not lab.store.read(lambda txn: list(txn.keys(IMAGES)))


async def test_an_image_that_exists_nowhere(lab: Lab, registry: FaultyRegistry, make_images: Start) -> None:
    lab.images = await make_images(insecure_registries=(registry.host,))  # type: ignore[assignment]
    failed: list[HypemanError] = []
    async with lab.running() as instances:
        with trio.fail_after(30):
            await create(instances, f"{registry.host}/none", failed)
        assert [type(error) for error in failed] == [NotFound]
        assert not list(instances.board.records())
