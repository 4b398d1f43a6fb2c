"""Builds in real guests: a server with the builder image, contexts, and what came of them."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from hypeman.host.files import data_ranges
from tests.real.appliance import ROOT, Appliance, running_appliance
from tests.real.kind import PATIENCE

BUILDER = "localhost/hypeman/buildkit:test"
SETTINGS = {"BUILD__IMAGE": BUILDER, "BUILD__DISK_SIZE": "4GB", "BUILD__TIMEOUT": f"{3 * PATIENCE:.0f}"}
_PIECE = 1 << 20
BASE = {"bin/busybox": Path("/bin/busybox")}
"""The only file that images need here, for `FROM scratch`."""


def builder_archive() -> Path:
    """The builder image; skips, saying why, where it was not made."""
    found = subprocess.run([ROOT / "packaging/builder/build", "--cached"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"{found.stderr.strip()}; `make test-builds` does both")
    return Path(found.stdout.strip())


def context(files: Mapping[str, bytes | str | Path]) -> bytes:
    """A tar.gz; paths are files of this host."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            if isinstance(content, Path):
                tar.add(content, name)
                continue
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


@asynccontextmanager
async def building(directory: Path, **environ: str) -> AsyncIterator[Appliance]:
    """A started server that can build."""
    builder_archive()
    async with running_appliance(directory, **SETTINGS, **environ) as appliance:
        await import_builder(appliance)
        yield appliance


async def import_builder(appliance: Appliance) -> None:
    data = await trio.Path(builder_archive()).read_bytes()
    imported = await appliance.ask("POST", "/images/import", params={"name": BUILDER}, content=data)
    assert imported.is_success, imported.text
    await wait_image(appliance, BUILDER)


async def wait_image(appliance: Appliance, name: str) -> Any:
    path = f"/images/{name.replace('/', '%2F').replace(':', '%3A')}"
    with trio.fail_after(PATIENCE):
        while (image := await appliance.get(path))["status"] != "ready":
            assert image["status"] != "failed", image
            await trio.sleep(0.1)
    return image


async def request(appliance: Appliance, files: Mapping[str, bytes | str | Path], **fields: Any) -> Any:
    """The build that was accepted. Fields that are no text are sent as JSON."""
    data = {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode() for name, value in fields.items()
    }
    answer = await appliance.ask("POST", "/builds", data=data, files={"source": ("context.tar.gz", context(files))})
    assert answer.status_code == 202, answer.text
    return answer.json()


async def finished(appliance: Appliance, build: Any) -> tuple[Any, list[str]]:
    """The build at its end, and its log."""
    events = await follow(appliance, build["id"])
    assert events[-1].get("status") in ("ready", "failed", "cancelled"), events[-1:]
    return await appliance.get(f"/builds/{build['id']}"), [
        event["content"] for event in events if event["type"] == "log"
    ]


async def build(appliance: Appliance, files: Mapping[str, bytes | str | Path], **fields: Any) -> tuple[Any, list[str]]:
    """The finished build, and its log."""
    return await finished(appliance, await request(appliance, files, **fields))


async def follow(appliance: Appliance, build_id: str) -> list[Any]:
    transport = httpx.AsyncHTTPTransport(uds=str(appliance.socket), verify=False)
    found = []
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://hypeman", timeout=4 * PATIENCE) as client,
        client.stream("GET", f"/builds/{build_id}/events", params={"follow": "true"}) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                found.append(msgspec.json.decode(line[6:]))
    return found


def files_with(directory: Path, secret: bytes) -> list[Path]:
    """Files below ``directory`` that contain ``secret``; of sparse ones, only what is on the disk is read."""
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and _contains(path, secret)]


def _contains(path: Path, secret: bytes) -> bool:
    with path.open("rb", buffering=0) as file:
        for start, end in data_ranges(file.fileno()):
            for at in range(start, end, _PIECE):
                if secret in os.pread(file.fileno(), _PIECE + len(secret), at):
                    return True
    return False


async def output_of(appliance: Appliance, image: str, name: str) -> str:
    """What an instance of the image prints; it ends by itself."""
    await appliance.create(name, image=image, wait="")
    await appliance.wait(name, "Stopped")
    status, text = await appliance.cli("logs", name)
    assert status == 0, text
    await appliance.delete(f"/instances/{name}")
    return text
