"""A registry of Debian's, images to put into it, and an Images service that works."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from hypeman.config import ImagesConfig
from hypeman.images.registry import Patience, RegistryClient
from hypeman.images.service import Images
from hypeman.paths import Paths
from hypeman.store import Store
from tests.images.faults import FaultyRegistry

QUICK = Patience(attempts=4, first_delay=0.02, longest_delay=0.1, connect=2, silence=0.5, grace=20)


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_registry(directory: Path, extra: str = "") -> Iterator[str]:
    """Debian's docker-registry on loopback; yields ``host:port``."""
    need("docker-registry", "skopeo")
    directory.mkdir(exist_ok=True)
    port = free_port()
    config = directory / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n{extra}"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, "docker-registry did not start"
            time.sleep(0.02)
        yield f"localhost:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def registry_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="session")
def debian_layer() -> bytes:
    """A small Debian as one layer, made once and kept below ``build``."""
    need_root()
    need("mmdebstrap")
    kept = Path(__file__).parents[2] / "build" / "test-images" / "debian-minbase.tar"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        side = kept.with_suffix(".new.tar")
        made = subprocess.run(
            ["mmdebstrap", "--variant=minbase", "--quiet", "bookworm", side], capture_output=True, timeout=300
        )
        if made.returncode != 0:
            side.unlink(missing_ok=True)
            pytest.skip(f"mmdebstrap cannot reach a mirror: {made.stderr[-200:].decode(errors='replace')}")
        side.rename(kept)
    return kept.read_bytes()


def push(layout: Path, target: str, *options: str, tag: str = "latest") -> None:
    """Push an OCI layout with skopeo."""
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "-q", *(options or ("--dest-tls-verify=false",)),
         f"oci:{layout}:{tag}", f"docker://{target}"],
        check=True,
    )  # fmt: skip


@pytest.fixture
async def registry() -> AsyncIterator[FaultyRegistry]:
    """A registry whose faults the test chooses."""
    async with trio.open_nursery() as nursery:
        server = FaultyRegistry()
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("requires root")


Start = Callable[..., Awaitable[Images]]


@pytest.fixture
async def make_images(store: Store, paths: Paths) -> AsyncIterator[Start]:
    """A function that starts an Images service; it is stopped at the end of the test, or with ``nursery``."""
    async with trio.open_nursery() as own:

        async def start(*, patience: Patience = QUICK, nursery: trio.Nursery = own, **settings: object) -> Images:
            config = ImagesConfig(**{"docker_config": "/nonexistent", **settings})  # type: ignore[arg-type]
            images = Images(store=store, paths=paths, config=config, registry=RegistryClient(config, patience=patience))
            await nursery.start(images.run)
            return images

        yield start
        own.cancel_scope.cancel()
