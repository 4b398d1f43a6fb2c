"""One life of the image service in a process of its own, so that its memory can be measured.

    python -m tests.bench.images_child <data dir> pull <host> <name>
    python -m tests.bench.images_child <data dir> import <path> <root_fs>

Prints seconds from the request to a ready image, and the most memory of server and worker in bytes.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.config import ImagesConfig
from hypeman.images.service import Images
from hypeman.images.types import CreateImageRequest, ImageStatus
from hypeman.paths import Paths
from hypeman.store import Store
from tests.bench.harness import peak_memory


class Outcome(msgspec.Struct):
    seconds: float
    server_memory: int
    worker_memory: int
    disk_bytes: int


async def main(data_dir: str, mode: str, first: str, second: str) -> Outcome:
    paths = Paths(Path(data_dir), Path(data_dir) / "run")
    if mode == "pull":
        config = ImagesConfig(insecure_registries=(first,), docker_config="/nonexistent")
    else:
        config = msgspec.convert({"import_paths": ("/",), "root_fs": second}, ImagesConfig)
    store = Store.open(paths.store)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        images = Images(store=store, paths=paths, config=config)
        await nursery.start(images.run)
        begin = time.perf_counter()
        if mode == "pull":
            image = await images.create(CreateImageRequest(second))
        else:
            image = await images.import_path(first, name="bench")
        image = await images.wait_final(image.name)
        seconds = time.perf_counter() - begin
        assert image.status is ImageStatus.READY, image.error
        nursery.cancel_scope.cancel()
    store.close()
    own = peak_memory(os.getpid())
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Outcome(seconds, own, children, image.size_bytes or 0)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(trio.run(partial(main, *sys.argv[1:]))))
