"""The service and the fake that stands for it in the crash matrix, held to the same suite."""

from __future__ import annotations

import pytest
import trio

from hypeman.paths import Paths
from hypeman.store import Store
from tests.conformance.check_images import CHECKS, Bench, Check
from tests.images.conftest import Start
from tests.images.faults import FaultyRegistry, Request, Response
from tests.images.layout import ImageFiles, entry, tar
from tests.instances.fake_world import Bomb, FakeImages

FILES = ImageFiles([tar(entry("one", data=b"1" * 9000))], config={"Entrypoint": ["/one"]})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_fake(check: Check, store: Store, paths: Paths) -> None:
    images = FakeImages(paths.images / "disk", Bomb())
    images.missing = True

    def hold() -> None:
        images.pulled = trio.Event()

    bench = Bench(
        images,
        store,
        name="busybox",
        absent="nobody/has-it",
        hold=hold,
        release=lambda: images.pulled.set(),
        is_pulling=lambda: images.waiting > 0,
    )
    await check(bench)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_real(check: Check, registry: FaultyRegistry, make_images: Start, store: Store) -> None:
    registry.serve("one", FILES)
    images = await make_images(insecure_registries=(registry.host,))

    def hold_blobs(request: Request) -> Response | None:
        return Response(200, {}, b"x" * 100, cut=0, then="stall") if "/blobs/" in request.path else None

    bench = Bench(
        images,
        store,
        name=f"{registry.host}/one",
        absent=f"{registry.host}/two",
        hold=lambda: registry.rules.append(hold_blobs),
        release=registry.rules.clear,
        is_pulling=lambda: images.statistics()["active"] > 0,
    )
    await check(bench)
