"""A build with everything that its caller lends it, in a real guest: a login for a registry with the base image, a
secret, and an SSH key with which a step clones from a Git server. Part of `make test-builds`.

The registry (with htpasswd) and the Git server (dropbear) are in another network namespace. What was lent is searched
for in every file of the server, its caches and volumes included.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.builds.guest import SETTINGS, build, builder_archive, files_with, import_builder, output_of
from tests.images.conftest import need
from tests.images.layout import ImageFiles, entry, symlink, tar
from tests.images.layout import directory as folder
from tests.real.appliance import Appliance, check_host, short_directory
from tests.real.kind import PATIENCE
from tests.real.world import ADDRESS, World, appliance_in_world

pytestmark = [pytest.mark.real, pytest.mark.slow]

USER, PASSWORD, SECRET = "builder", "the password of the registry", "a very secret word"
REGISTRY = f"{ADDRESS}:5000"
SSH_PORT = 2222
DOCKERFILE = f"""
FROM {REGISTRY}/private/tools:v1
RUN --mount=type=ssh --mount=type=secret,id=word \\
    GIT_SSH_COMMAND="ssh -o StrictHostKeyChecking=no -p {SSH_PORT}" git clone git@{ADDRESS}:repository /clone && \\
    echo "$(cat /clone/file), $(wc -c < /run/secrets/word) bytes" > /result
CMD ["cat", "/result"]
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    need("docker-registry", "skopeo", "git", "ssh", "ssh-keygen", "/usr/sbin/dropbear")
    yield from short_directory("lent")


async def test_what_is_lent_to_a_build_works_and_stays_nowhere(directory: Path) -> None:
    builder_archive()
    lent, server = directory / "lent", directory / "server"
    lent.mkdir()
    server.mkdir()
    key = make_key(lent / "key")
    settings = {**SETTINGS, "IMAGES__INSECURE_REGISTRIES": f"[{REGISTRY}]"}
    async with appliance_in_world(server, **settings) as (appliance, world):
        await import_builder(appliance)
        with registry(world, lent), git_server(world, lent):
            await appliance.post("/builders", {"id": "kept", "disk_size_gb": 2})
            files = {"Dockerfile": DOCKERFILE}
            fields: dict[str, Any] = {
                "image_name": "team/cloned",
                "builder_id": "kept",
                "secrets": [{"id": "word", "value": SECRET}],
                "ssh": [{"id": "default", "value": key}],
            }
            refused, log = await build(appliance, files, **fields, registry_auth=login("wrong"))
            assert refused["status"] == "failed" and "401" in refused["error"], (refused, log)
            done, log = await build(appliance, files, **fields, registry_auth=login(PASSWORD))
            assert done["status"] == "ready", (done["error"], log)
            await check_cache_elsewhere(appliance)
        await wait_no_vm(appliance)
        assert f"from the server, {len(SECRET)} bytes" in await output_of(appliance, "team/cloned", "cloned")
        words = [PASSWORD, SECRET, key.splitlines()[2], base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()]
        for word in words:
            assert files_with(server, word.encode()) == []
            assert not any(word in line for line in log)


async def check_cache_elsewhere(appliance: Appliance) -> None:
    """BuildKit's own cache in another registry, written by one build and read by another, each without a builder."""
    text = f"FROM {REGISTRY}/private/tools:v1\nRUN echo shared > /file\n"
    place = f"type=registry,ref={REGISTRY}/private/cache"
    for fields in ({"cache_to": [f"{place},mode=max"]}, {"cache_from": [place]}):
        done, log = await build(appliance, {"Dockerfile": text}, registry_auth=login(PASSWORD), **fields)
        assert done["status"] == "ready", (done["error"], log)
        assert any(line.endswith("CACHED") for line in log) is ("cache_from" in fields), log


def login(password: str) -> dict[str, Any]:
    """A Docker configuration."""
    return {"auths": {REGISTRY: {"auth": base64.b64encode(f"{USER}:{password}".encode()).decode()}}}


def make_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.read_text()


async def wait_no_vm(appliance: Appliance) -> None:
    with trio.fail_after(PATIENCE):
        while await appliance.get("/instances"):
            await trio.sleep(0.1)


@contextmanager
def registry(world: World, lent: Path) -> Iterator[None]:
    """Debian's docker-registry with a login, and the base image in it."""
    hashing = ["perl", "-e", "print crypt($ARGV[0], q($2y$05$abcdefghijklmnopqrstuu))", PASSWORD]  # bcrypt
    hashed = subprocess.run(hashing, check=True, capture_output=True, text=True).stdout
    (lent / "htpasswd").write_text(f"{USER}:{hashed}\n")
    config = lent / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {lent}/blobs}}}}\n"
        f"auth: {{htpasswd: {{realm: test, path: {lent}/htpasswd}}}}\nhttp: {{addr: '{REGISTRY}'}}\n"
    )
    with running(world, lent, "docker-registry", "serve", str(config)):
        wait_port(world, 5000)
        layout = tools().write_layout(lent / "tools")
        command = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", "--dest-creds",
                   f"{USER}:{PASSWORD}", f"oci:{layout}:latest", f"docker://{REGISTRY}/private/tools:v1"]  # fmt: skip
        subprocess.run(world.command(*command), check=True)
        yield


@contextmanager
def git_server(world: World, lent: Path) -> Iterator[None]:
    """dropbear, which lets the key clone the repository, and nothing else."""
    source, home = lent / "repository", lent / "home"
    source.mkdir()
    (source / "file").write_text("from the server")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", str(source)]
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    keys = home / ".ssh/authorized_keys"
    keys.write_text(f'command="git-upload-pack {source}" {(lent / "key.pub").read_text()}')
    keys.chmod(0o600)
    subprocess.run(["dropbearkey", "-t", "ed25519", "-f", lent / "host"], check=True, capture_output=True)
    etc = Path("/etc/netns") / world.name  # `ip netns exec` puts it in the place of /etc
    etc.mkdir(parents=True)
    try:
        (etc / "passwd").write_text(f"git:*:0:0::{home}:/bin/sh\n")
        with running(
            world, lent, "/usr/sbin/dropbear", "-F", "-E", "-p", f"{ADDRESS}:{SSH_PORT}", "-r", f"{lent}/host"
        ):
            wait_port(world, SSH_PORT)
            yield
    finally:
        shutil.rmtree(etc)


@contextmanager
def running(world: World, lent: Path, *command: str) -> Iterator[None]:
    with (lent / f"{Path(command[0]).name}.log").open("wb") as log:
        process = subprocess.Popen(world.command(*command), stdout=log, stderr=log)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def wait_port(world: World, port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while f":{port} " not in world.run("ss", "-Hltn"):
        assert time.monotonic() < deadline, f"nothing listens on port {port}"
        time.sleep(0.05)


def tools() -> ImageFiles:
    """A base image with busybox, git and ssh of this host, and their libraries."""
    programs = {"bin/git": "git", "bin/ssh": "ssh"}
    files = {"bin/busybox": Path("/bin/busybox")}
    for name, program in programs.items():
        path = Path(shutil.which(program) or "")
        files[name] = path
        for line in subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout.splitlines():
            found = [word for word in line.split() if word.startswith("/")]
            files.update({word.lstrip("/"): Path(word) for word in found})
    names = subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout.split()
    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    layer = tar(
        *(folder(name) for name in (*folders, "etc", "tmp", "root", "usr/lib/git-core")),
        *(entry(name, data=path.resolve().read_bytes(), mode=0o755) for name, path in files.items()),
        *(symlink(f"bin/{name}", "busybox") for name in names if name != "busybox"),
        symlink("usr/lib/git-core/git", "/bin/git"),
        entry("etc/passwd", data=b"root:x:0:0:root:/root:/bin/sh\n"),
    )
    return ImageFiles([layer], config={"Env": ["PATH=/bin"]})
