"""Other people's clients at our registry: podman (Debian), crane and oras (Go module proxy). skopeo is in
``test_registry.py``.

Built once into build/; `make test-conformance` runs it. Not part of `make test`: it needs Go and its module proxy.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hypeman.images.types import ImageStatus
from tests.images.conftest import need, need_root
from tests.images.layout import ImageFiles, archive_directory, directory, entry, tar
from tests.real.appliance import short_directory
from tests.registry.conftest import Served

pytestmark = [pytest.mark.real, pytest.mark.slow]

MODULES = {
    "crane": "github.com/google/go-containerregistry/cmd/crane@v0.22.1",
    "oras": "oras.land/oras/cmd/oras@v1.3.6",
}
BIN = Path(__file__).parents[2] / "build" / "registry-clients"
IMAGE = ImageFiles([tar(directory("etc"), entry("etc/name", data=b"pushed"))], config={"Cmd": ["/bin/true"]})


def built(name: str) -> str:
    program = BIN / name
    if not program.exists():
        subprocess.run(["go", "install", MODULES[name]], check=True, timeout=900, env={**os.environ, "GOBIN": str(BIN)})
    return str(program)


class Client:
    """A program with a home of its own, which it has logged in from."""

    def __init__(self, home: Path, *command: str) -> None:
        self._home = home
        self._command = command

    async def run(self, *arguments: str, stdin: str = "") -> str:
        result = await trio.run_process(
            [*self._command, *arguments],
            stdin=stdin.encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=self._home,
            env={**os.environ, "HOME": str(self._home), "XDG_RUNTIME_DIR": str(self._home)},
        )
        assert result.returncode == 0, f"{arguments}: {result.stderr.decode()}"
        return result.stdout.decode()


@pytest.fixture
def homes() -> Iterator[Path]:
    """podman refuses long paths."""
    yield from short_directory("podman")


async def test_podman(served: Served, homes: Path, tmp_path: Path) -> None:
    """An image is pushed and becomes one of this host; another podman pulls the same."""
    need_root()
    need("podman")
    archive = tmp_path / "image.tar"
    archive.write_bytes(archive_directory(IMAGE.write_layout(tmp_path / "layout")))
    remote = f"{served.host}/team/podman:v1"

    def podman(name: str) -> Client:
        home = homes / name
        home.mkdir()
        storage = ("--storage-driver=vfs", f"--root={home}/root", f"--runroot={home}/run", "--events-backend=none")
        return Client(home, "podman", *storage, "--cgroup-manager=cgroupfs")

    first, second = podman("first"), podman("second")
    login = ("login", "--tls-verify=false", "-u", "any", "--password-stdin", served.host)
    for client in (first, second):
        await client.run(*login, stdin=served.token)
    await first.run("load", "-i", str(archive))
    await first.run("push", "--tls-verify=false", "localhost/latest:latest", remote)
    image = await served.images.wait_final("team/podman:v1")
    assert image.status is ImageStatus.READY
    await second.run("pull", "-q", "--tls-verify=false", remote)
    [config] = json.loads(await second.run("image", "inspect", remote))
    assert config["Digest"] == image.digest and config["Config"]["Cmd"] == ["/bin/true"]


async def test_crane(served: Served, tmp_path: Path) -> None:
    need_root()
    crane = Client(tmp_path, built("crane"))
    layout = IMAGE.write_layout(tmp_path / "layout")
    await crane.run("auth", "login", "--insecure", served.host, "-u", "any", "--password-stdin", stdin=served.token)
    remote, other = f"{served.host}/team/crane", f"{served.host}/other/copy"
    await crane.run("push", "--insecure", str(layout), f"{remote}:v1")
    assert (await served.images.wait_final("team/crane:v1")).status is ImageStatus.READY
    assert (await crane.run("digest", "--insecure", f"{remote}:v1")).strip() == IMAGE.digest
    await crane.run("copy", "--insecure", f"{remote}:v1", f"{other}:v1")
    await crane.run("tag", "--insecure", f"{other}:v1", "v2")
    assert (await crane.run("ls", "--insecure", other)).split() == ["v1", "v2"]
    await crane.run("pull", "--insecure", "--format=oci", f"{other}:v2", "pulled")
    assert (tmp_path / "pulled/blobs/sha256" / IMAGE.digest.removeprefix("sha256:")).read_bytes() == IMAGE.manifest
    await crane.run("delete", "--insecure", f"{other}@{IMAGE.digest}")
    assert (await crane.run("ls", "--insecure", other)).split() == []


async def test_oras(served: Served, tmp_path: Path) -> None:
    """Files as artifacts, which are no images here, and one that refers to another."""
    oras = Client(tmp_path, built("oras"))
    await oras.run("login", "--plain-http", served.host, "-u", "any", "--password-stdin", stdin=served.token)
    (tmp_path / "file").write_text("content")
    (tmp_path / "bill").write_text("{}")
    remote = f"{served.host}/team/files:v1"
    await oras.run("push", "--plain-http", "--artifact-type", "application/x.file", remote, "file")
    await oras.run("attach", "--plain-http", "--artifact-type", "application/x.sbom", remote, "bill")
    found = json.loads(await oras.run("discover", "--plain-http", "--format", "json", remote))
    assert [referrer["artifactType"] for referrer in found["referrers"]] == ["application/x.sbom"]
    await oras.run("pull", "--plain-http", "-o", "back", remote)
    assert (tmp_path / "back/file").read_text() == "content"
    assert await served.images.list() == []
