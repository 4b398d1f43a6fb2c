"""What instances rely on in images, as one suite: on the real service and on the fake of the crash matrix."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import pytest
import trio
import trio.testing

from hypeman.errors import HypemanError, InvalidRequest, InvalidState, NotFound
from hypeman.images.types import ImageConfig, ReadyImage
from hypeman.store import Store, Txn


class Images(Protocol):
    def platform(self, text: str | None) -> str: ...
    async def wait_ready(self, name: str, platform: str | None = None) -> ReadyImage: ...
    def find_ready(self, name: str, platform: str | None = None) -> ReadyImage | None: ...
    async def abandon(self, name: str) -> None: ...
    def disk(self, digest: str) -> Path: ...
    def root_fs(self, digest: str) -> str: ...
    def config(self, digest: str) -> ImageConfig: ...
    def pin(self, txn: Txn, digest: str, holder: str) -> None: ...
    def unpin(self, txn: Txn, holder: str) -> None: ...


class Bench:
    """``name`` can be pulled, but is not there yet; ``absent`` exists nowhere. A pull that is held does not end."""

    def __init__(
        self,
        images: Images,
        store: Store,
        *,
        name: str,
        absent: str,
        hold: Callable[[], None],
        release: Callable[[], None],
        is_pulling: Callable[[], bool],
    ) -> None:
        self.images = images
        self.store = store
        self.name = name
        self.absent = absent
        self.hold = hold
        self.release = release
        self.is_pulling = is_pulling

    async def pull(self) -> ReadyImage:
        with trio.fail_after(60):
            return await self.images.wait_ready(self.name)

    async def until_pulling(self) -> None:
        with trio.fail_after(30):
            while not self.is_pulling():
                await trio.sleep(0.01)


Check = Callable[[Bench], Awaitable[None]]


async def check_it_is_ready_once_it_was_pulled(bench: Bench) -> None:
    assert bench.images.find_ready(bench.name) is None
    image = await bench.pull()
    found = bench.images.find_ready(bench.name)
    assert found == image and await bench.images.wait_ready(bench.name) == image


async def check_it_can_be_booted_from(bench: Bench) -> None:
    image = await bench.pull()
    assert bench.images.disk(image.digest) == image.disk and image.disk.is_file()
    assert bench.images.root_fs(image.digest) == image.fs in ("erofs", "ext4")
    assert bench.images.config(image.digest) == image.config
    assert image.platform == bench.images.platform(None)


async def check_what_exists_nowhere_is_not_found(bench: Bench) -> None:
    assert bench.images.find_ready(bench.absent) is None
    with pytest.raises(NotFound), trio.fail_after(60):
        await bench.images.wait_ready(bench.absent)
    await bench.images.abandon(bench.absent)


async def check_what_is_no_name_is_refused(bench: Bench) -> None:
    for name in ("", "Upper/Case", "a:b:c"):
        with pytest.raises(InvalidRequest):
            bench.images.find_ready(name)
        with pytest.raises(InvalidRequest):
            await bench.images.wait_ready(name)
    with pytest.raises(InvalidRequest):
        bench.images.platform("plan9")


async def check_a_ready_image_can_be_pinned(bench: Bench) -> None:
    image = await bench.pull()
    for _ in range(2):
        await bench.store.write(lambda txn: bench.images.pin(txn, image.digest, "one"))
    for _ in range(2):
        await bench.store.write(lambda txn: bench.images.unpin(txn, "one"))


async def check_another_can_not(bench: Bench) -> None:
    with pytest.raises(InvalidState):
        await bench.store.write(lambda txn: bench.images.pin(txn, "sha256:" + "9" * 64, "one"))


async def check_many_can_wait_for_one(bench: Bench) -> None:
    bench.hold()
    found: list[str] = []

    async def wait() -> None:
        found.append((await bench.pull()).digest)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await bench.until_pulling()
        assert not found and bench.images.find_ready(bench.name) is None
        bench.release()
    assert len(found) == 3 and len(set(found)) == 1


async def check_a_pull_that_is_abandoned_stops(bench: Bench) -> None:
    """And can be begun again."""
    bench.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.pull)
        await bench.until_pulling()
        nursery.cancel_scope.cancel()
    await bench.images.abandon(bench.name)
    assert not bench.is_pulling()
    assert bench.images.find_ready(bench.name) is None
    bench.release()
    await bench.pull()


async def check_it_does_not_while_another_waits(bench: Bench) -> None:
    bench.hold()
    given_up = trio.CancelScope()

    async def wait_until_given_up() -> None:
        with given_up:
            await bench.pull()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.pull)
        nursery.start_soon(wait_until_given_up)
        await bench.until_pulling()
        given_up.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await bench.images.abandon(bench.name)
        assert bench.is_pulling()
        bench.release()
    assert bench.images.find_ready(bench.name) is not None


async def check_what_is_ready_is_not_abandoned(bench: Bench) -> None:
    image = await bench.pull()
    await bench.images.abandon(bench.name)
    assert bench.images.find_ready(bench.name) == image


async def check_errors_are_for_clients(bench: Bench) -> None:
    with pytest.raises(HypemanError) as caught, trio.fail_after(60):
        await bench.images.wait_ready(bench.absent)
    assert caught.value.status == 404


CHECKS: tuple[Check, ...] = tuple(check for name, check in list(globals().items()) if name.startswith("check_"))
