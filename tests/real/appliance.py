"""A whole server, for tests: in a network namespace of its own, with a data directory of its own, asked
through its unix socket. What it leaves behind when it is killed is what the tests look at. ``kind.py`` chooses its VMM.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from hypeman.host.processes import MARK_VARIABLE, mark_argument
from tests.real import kind
from tests.real.kind import PATIENCE as PATIENCE

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/busybox:test"
MARK = re.compile(r"hm-[0-9a-f]{32}")
"""As an argument of a program (``mark_argument``)."""


def check_host() -> None:
    """Skip, saying why, where no real guest can run."""
    if os.geteuid() != 0:
        pytest.skip("real guests need root (namespaces, TAPs)")
    for program in ("qemu-system-x86_64", "ip", "nft", "mkfs.ext4"):
        if shutil.which(program, path="/usr/sbin:/sbin:" + os.environ["PATH"]) is None:
            pytest.skip(f"{program} is not installed")
    if not Path("/bin/busybox").exists():
        pytest.skip("busybox-static is not installed")
    if not (ROOT / "build/guest/vmlinux").exists():
        pytest.skip("there is no guest kernel; `make ready` gets one")


def busybox_archive(**config: Any) -> bytes:
    """A `docker save` archive of one layer with a static busybox; ``config`` goes into its image config."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tree:
        for name in ("bin", "etc", "tmp", "home"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tree.addfile(directory)
        tree.add("/bin/busybox", "bin/busybox")
        for name in subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True).stdout.split():
            if name != "busybox":
                link = tarfile.TarInfo(f"bin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tree.addfile(link)
        passwd = b"root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\n"
        info = tarfile.TarInfo("etc/passwd")
        info.size = len(passwd)
        tree.addfile(info, io.BytesIO(passwd))
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sleep", "1000000"], **config},
        "rootfs": {"type": "layers", "diff_ids": [_sha256(layer.getvalue())]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    saved = io.BytesIO()
    with tarfile.open(fileobj=saved, mode="w") as archive:
        for name, content in (
            ("manifest.json", json.dumps(manifest).encode()),
            ("config.json", json.dumps(image).encode()),
            ("layer.tar", layer.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return saved.getvalue()


def _sha256(data: bytes) -> str:
    import hashlib

    return "sha256:" + hashlib.sha256(data).hexdigest()


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Namespace:
    """A network namespace, removed with everything in it."""

    def __init__(self) -> None:
        self.name = f"hmt{secrets.token_hex(4)}"
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.run("ip", "link", "set", "lo", "up")
        self.inode = Path("/run/netns", self.name).stat().st_ino

    def command(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv: str) -> str:
        return subprocess.run(self.command(*argv), check=True, capture_output=True, text=True).stdout

    @contextmanager
    def serving(self, program: str, *arguments: str) -> Iterator[None]:
        """A Python program that prints a line when it listens."""
        process = subprocess.Popen(
            self.command(sys.executable, "-u", "-c", program, *arguments), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline(), "the server did not start"
            yield
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def links(self) -> list[str]:
        """Names of all interfaces but lo."""
        return [link["ifname"] for link in json.loads(self.run("ip", "-j", "link")) if link["ifname"] != "lo"]

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True)
        for note in Path("/run/hypeman").glob(f"network-{self.inode}.*"):
            note.unlink()


class Appliance:
    """One data directory and the server processes that serve it, one after another."""

    def __init__(self, directory: Path, **environ: str) -> None:
        self.directory = directory
        self.directory.chmod(0o755)  # VMMs run as users of their own and pass through here
        self.namespace = Namespace()
        self.data = directory / "data"
        self.socket = directory / "run" / "hypeman.sock"
        self.log = directory / "server.log"
        self.module: tuple[str, ...] = ()
        """The server with something in it, in the place of the server."""
        self.boot_id: Path | None = None
        """A file with what servers shall take for the host's boot id."""
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    # The server's life

    async def start(self, *, killable: str = "", **environ: str) -> None:
        """Start the server and wait for its first answer. ``killable`` is a file that arms tests/real/killable.py."""
        module = ["-m", "tests.real.killable", killable] if killable else ["-m", *(self.module or ("hypeman", "serve"))]
        settings = {
            "DATA_DIR": str(self.data),
            "RUN_DIR": str(self.socket.parent),
            "PORT": "0",
            "METRICS__ENABLED": "false",
            **kind.settings(),
            "OVERSUBSCRIPTION__CPU": "32",  # tests start more guests than the machine has processors
            "LOG__FORMAT": "text",
            "LOG__LEVEL": "debug",
            **self._environ,
            **environ,
        }
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.namespace.command(
                    *self._rebooted(), sys.executable, "-W", "error::ResourceWarning:hypeman", *module
                ),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, **settings},
            )
        with trio.fail_after(PATIENCE):
            while not await self._answers():
                assert self._process.poll() is None, f"the server did not start:\n{self.log_tail()}"
                await trio.sleep(0.05)

    def _rebooted(self) -> tuple[str, ...]:
        """`ip netns exec` has made a mount namespace of its own for the server."""
        if self.boot_id is None:
            return ()
        script = f'mount --bind "$0" {BOOT_ID} && exec "$@"'
        return ("sh", "-c", script, str(self.boot_id))

    async def start_with_image(self, *, killable: str = "") -> None:
        """The first start, until IMAGE is ready."""
        warm = Path(kind.WARM, kind.KIND or "tcg") if kind.WARM else None
        if warm is not None and not warm.exists():
            await self.start()
            await self.import_busybox()
            with trio.fail_after(PATIENCE):
                while not (await self.get("/capabilities"))["default_runtime"]["available"]:
                    await trio.sleep(0.5)
            self.stop()
            copy(self.data, warm.with_suffix(".new"))
            warm.with_suffix(".new").rename(warm)
        elif warm is not None:
            copy(warm, self.data)
        await self.start(killable=killable)
        if warm is None:
            await self.import_busybox()

    async def _answers(self) -> bool:
        try:
            return (await self.ask("GET", "/health")).status_code == 200
        except (httpx.TransportError, OSError):
            return False

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(timeout=PATIENCE)
        self._process = None
        return code

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def wait_killed(self) -> None:
        """Wait for the server that has killed itself, as it was armed to."""
        assert self._process is not None
        with trio.fail_after(PATIENCE):
            while self._process.poll() is None:
                await trio.sleep(0.05)
        self._process = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        self.kill()
        for pid in (*self.vmms(), *self.engines()):
            os.kill(pid, signal.SIGKILL)
        self.namespace.remove()
        shutil.rmtree(self.directory, ignore_errors=True)

    def engines(self) -> list[int]:
        """Egress engines that outlived the server. Asked while it runs, they would leave it for us."""
        found = []
        for path in (self.directory / "run" / "engine").glob("*.sock"):
            with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionRefusedError):
                connection.connect(str(path))
                found.append(struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
        return found

    # Asking

    async def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), verify=False)  # a TLS context costs 30 ms
        settings: dict[str, Any] = {"base_url": "http://hypeman", "timeout": PATIENCE, "trust_env": False}
        async with httpx.AsyncClient(transport=transport, **settings) as client:
            return await client.request(method, path, **arguments)

    async def get(self, path: str) -> Any:
        return self._body(await self.ask("GET", path))

    async def post(self, path: str, body: object = None, **arguments: Any) -> Any:
        return self._body(await self.ask("POST", path, json=body, **arguments))

    async def delete(self, path: str) -> None:
        self._body(await self.ask("DELETE", path))

    def _body(self, answer: httpx.Response) -> Any:
        assert answer.is_success, f"{answer.request.method} {answer.url}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def import_busybox(self, **config: Any) -> None:
        """Have IMAGE ready."""
        archive = busybox_archive(**config)
        self._body(await self.ask("POST", "/images/import", params={"name": IMAGE}, content=archive))
        with trio.fail_after(PATIENCE):
            while (image := await self.get("/images/localhost%2Fbusybox%3Atest"))["status"] != "ready":
                assert image["status"] != "failed", image
                await trio.sleep(0.05)

    async def create(self, name: str, *, wait: str = "Running", **request: Any) -> Any:
        body = {"name": name, "image": IMAGE, "size": "128MB", "vcpus": 1, "overlay_size": "64MB", **request}
        made = await self.post("/instances", body)
        return await self.wait(name, wait) if wait else made

    async def wait(self, name: str, state: str) -> Any:
        """The instance, once it is in ``state``."""
        answer = await self.get(f"/instances/{name}/wait?state={state}&timeout={PATIENCE:.0f}s")
        assert answer["state"] == state, f"{answer}\n{self.log_tail()}"
        return await self.get(f"/instances/{name}")

    async def exec(self, name: str, *command: str, stdin: bytes = b"") -> tuple[int, str]:
        """Exit code and output of a program in the guest."""
        forward = ("-i",) if stdin else ()
        return await self.cli("exec", "-T", *forward, name, "--", *command, stdin=stdin)

    async def cli(self, *arguments: str, stdin: bytes = b"") -> tuple[int, str]:
        """Exit code and output of the command line client."""
        argv = [sys.executable, "-m", "hypeman", "--base-url", f"unix://{self.socket}", *arguments]
        result = await trio.run_process(
            argv, stdin=stdin, capture_stdout=True, capture_stderr=True, check=False, cwd=ROOT
        )
        return result.returncode, (result.stdout + result.stderr).decode()

    # What lies about

    @property
    def pid(self) -> int:
        assert self._process is not None  # `ip netns exec` has become the server
        return self._process.pid

    def open_files(self) -> int:
        """Descriptors that the server has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def vmms(self) -> dict[int, str]:
        """Processes of VMMs of this appliance: pid and run directory, or, where that is not known, the mark."""
        vms = self.socket.parent / "vm"
        ids = {path.name for place in (vms, self.data / "instances") if place.is_dir() for path in place.iterdir()}
        by_argument = {mark_argument(str(vms / each)): str(vms / each) for each in ids}
        here = self.namespace.inode
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ = (entry / "environ").read_bytes().split(b"\0")
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    ours = (entry / "ns/net").stat().st_ino == here
                except OSError:
                    continue
                for variable in environ:
                    if variable.startswith(f"{MARK_VARIABLE}={self.directory}".encode()):
                        found[int(entry.name)] = variable.decode().partition("=")[2]
                for word in words if ours and environ == [b""] else ():  # its jailer has emptied the environment
                    if word in by_argument or MARK.fullmatch(word):
                        found[int(entry.name)] = by_argument.get(word, word)
        return found

    def files(self) -> set[str]:
        """Everything below the data directory that belongs to instances, captures or snapshots, and runtime
        directories; the store, images and templates apart."""
        kept = {"store", "images", "blobs", "templates", "egress"}
        found = {
            str(path.relative_to(self.data))
            for path in self.data.rglob("*")
            if path.relative_to(self.data).parts[0] not in kept and not (path.is_dir() and path.parent == self.data)
        }
        vms = self.socket.parent / "vm"
        return found | {f"vm/{path.name}" for path in (vms.iterdir() if vms.is_dir() else ())}

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


@asynccontextmanager
async def running_appliance(
    directory: Path, module: tuple[str, ...] = (), /, **environ: str
) -> AsyncIterator[Appliance]:
    """A started server, or ``module`` in its place, with IMAGE ready."""
    appliance = Appliance(directory, **environ)
    appliance.module = module
    try:
        await appliance.start_with_image()
        yield appliance
    finally:
        appliance.close()


def copy(directory: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", "--sparse=always", directory, to], check=True)


def short_directory(name: str) -> Iterator[Path]:
    """A directory with a path short enough for sockets below it."""
    directory = Path("/tmp") / f"hm-{name}-{secrets.token_hex(3)}"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
