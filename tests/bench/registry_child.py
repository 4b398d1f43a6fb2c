"""The registry in a process of its own, on loopback: ``python -m tests.bench.registry_child <data dir> <secret>``.

Prints its port. What is pushed is only stored: an image that is made of it would be another measurement.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

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
from hypeman.telemetry.logs import setup_logs
from tests.fakes.services import FakeWorld


async def main(data_dir: str, secret: str) -> None:
    setup_logs()
    paths = Paths(Path(data_dir), Path(data_dir) / "run")
    config = ImagesConfig(docker_config="/nonexistent")
    store = Store.open(paths.store)
    [tcp] = bind_tcp("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        images = Images(store=store, paths=paths, config=config, kept=digests_in_use, on_delete=forget_image)
        await nursery.start(images.run)
        registry = Registry(store=store, blobs=images.blobs, images=images, max_blob_bytes=config.max_image_size)
        await nursery.start(registry.run)
        world = FakeWorld(Path(data_dir))
        world.images = images  # type: ignore[assignment]
        world.registry = registry
        server = Server(build_app(world.services, ServerSettings(jwt_secret=secret)), grace=1.0)
        await nursery.start(partial(server.run, [tcp], trio.Event()))
        print(tcp.getsockname()[1], flush=True)


if __name__ == "__main__":
    trio.run(partial(main, *sys.argv[1:]))
