"""A server with a real registry, real images and a store; everything else is a fake."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from hypeman.config import ImagesConfig
from hypeman.images.service import Images
from hypeman.paths import Paths
from hypeman.registry.records import digests_in_use, forget_image
from hypeman.registry.service import Registry
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_tcp
from hypeman.store import Store
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld
from tests.images.conftest import registry_host, running_registry

__all__ = ["registry_host", "running_registry"]

SECRET = "a secret that is long enough for HS256"


class Served:
    """``host`` is where clients find it; ``token`` may do everything."""

    def __init__(self, host: str, images: Images, registry: Registry, store: Store) -> None:
        self.host = host
        self.images = images
        self.registry = registry
        self.store = store
        self.token = mint(SECRET, subject="tester")

    def client(self, token: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.AsyncClient(base_url=f"http://{self.host}", headers=headers, timeout=30)

    async def skopeo(self, *arguments: str) -> str:
        """Output of skopeo, logged in at this server."""
        if shutil.which("skopeo") is None:
            pytest.skip("skopeo is not installed")
        command = ["skopeo", "--insecure-policy", *arguments]
        result = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout.decode()


@pytest.fixture
async def served(store: Store, paths: Paths, tmp_path: Path, registry_host: str) -> AsyncIterator[Served]:
    config = ImagesConfig(docker_config="/nonexistent", insecure_registries=(registry_host,))
    images = Images(store=store, paths=paths, config=config, kept=digests_in_use, on_delete=forget_image)
    registry = Registry(store=store, blobs=images.blobs, images=images, max_blob_bytes=1 << 20)
    logs = tmp_path / "logs"
    logs.mkdir()
    world = FakeWorld(logs)
    world.images = images  # type: ignore[assignment]
    world.registry = registry
    shutdown = trio.Event()
    [tcp] = bind_tcp("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(images.run)
        await nursery.start(registry.run)
        server = Server(build_app(world.services, ServerSettings(jwt_secret=SECRET)), grace=1.0)
        await nursery.start(partial(server.run, [tcp], shutdown))
        yield Served(f"localhost:{tcp.getsockname()[1]}", images, registry, store)
        shutdown.set()
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
