"""``make demo``: an OCI image becomes a VM, in front of your eyes.

A registry (Debian's docker-registry) and a Hypeman server start in a network and process namespace of
their own, with a data directory of their own; nothing is downloaded, nothing on this machine changes,
and whatever happens, nothing is left: the namespace takes every process with it when it ends. All that
follows is what a user types.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PYTHON = [sys.executable, "-m", "hypeman"]
REGISTRY = "127.0.0.1:5000"
IMAGE = f"{REGISTRY}/demo:latest"
SCRIPT = 'echo "hello from $(hostname), kernel $(uname -r)"; until [ -e /tmp/done ]; do sleep 0.2; done; exit 7'
PATIENCE = 240.0

durations: dict[str, float] = {}


@contextmanager
def phase(name: str) -> Iterator[None]:
    print(f"\n--- {name}", flush=True)
    begin = time.monotonic()
    yield
    durations[name] = time.monotonic() - begin


def main() -> int:
    if "--inside" not in sys.argv:
        namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        as_root = [] if os.geteuid() == 0 else ["sudo"]
        return subprocess.run([*as_root, *namespaces, sys.executable, "-m", "tests.demo", "--inside"]).returncode
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    folder = Path(tempfile.mkdtemp(prefix="hypeman-demo."))
    folder.chmod(0o755)  # VMMs run as users of their own and pass through here
    try:
        demonstrate(folder)
    except Exception:
        for log in sorted([*folder.glob("*.log"), *folder.glob("data/instances/*/logs/*.log")]):
            print(f"\n=== {log.relative_to(folder)}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(folder)
    print("\nphase times: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in durations.items()))
    print("demo: ok")
    return 0


def demonstrate(folder: Path) -> None:
    registry = ["docker-registry", "serve", str(write_registry_config(folder))]
    environment = {
        **os.environ,
        "DATA_DIR": f"{folder}/data",
        "RUN_DIR": f"{folder}/run",
        "JWT_SECRET": "a secret only for this demonstration",
        "IMAGES__INSECURE_REGISTRIES": json.dumps([REGISTRY]),
    }
    with started(registry, folder / "registry.log"):
        with phase("a registry, and an image made from busybox"):
            wait_until("the registry listens", lambda: can_connect(5000))
            push_image(folder)
        with started([*PYTHON, "serve"], folder / "server.log", environment) as server:
            with phase("the server starts"):
                wait_until("the server answers", lambda: can_connect(8080), server)
            os.environ["HYPEMAN_API_KEY"] = hypeman("token", environment=environment, quiet=True).strip()
            use_it()
            with phase("the server stops"):
                server.send_signal(signal.SIGTERM)
                assert server.wait(PATIENCE) == 0, "the server ends with code 0"
    check_nothing_is_left(folder)


def use_it() -> None:
    """What a user types, and what must come of it."""
    with phase("pull"):
        hypeman("pull", IMAGE)
        wait_until("the image is ready", lambda: json.loads(get("image", "get", IMAGE))["status"] == "ready")
    with phase("run"):
        hypeman("run", "--name", "demo", "--memory", "256MB", "--cpus", "1", "--overlay-size", "256MB", IMAGE)
        hypeman("wait", "demo", "--state", "Running", "--timeout", "3m")
    with phase("logs"):
        wait_until("the guest has said hello", lambda: "hello from" in get("logs", "demo"))
        hypeman("logs", "demo")
    with phase("exec"):
        assert "Linux" in hypeman("exec", "demo", "--", "uname", "-a")
        assert hypeman("exec", "demo", "--", "sh", "-c", "exit 3", expect=3) == ""
        hypeman("exec", "demo", "--", "touch", "/tmp/done")
    with phase("exit code"):
        hypeman("wait", "demo", "--state", "Stopped", "--timeout", "3m")
        instance = json.loads(get("inspect", "demo"))
        print(f"exit code {instance['exit_code']}, phases in ms: {instance.get('phase_durations_ms')}")
        assert instance["exit_code"] == 7, "the code that the program in the guest ended with"
    with phase("delete"):
        hypeman("rm", "demo")
        assert json.loads(get("ps", "--all")) == []
        hypeman("image", "rm", IMAGE)


def hypeman(*arguments: str, expect: int = 0, quiet: bool = False, environment: dict[str, str] | None = None) -> str:
    if not quiet:
        print(f"$ hypeman {' '.join(arguments)}", flush=True)
    result = subprocess.run(
        [*PYTHON, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if not quiet:
        print(result.stdout, end="", flush=True)
    if result.returncode != expect:
        raise RuntimeError(
            f"hypeman {' '.join(arguments)} ended with {result.returncode}, not {expect}: {result.stderr}"
        )
    return result.stdout


def get(*arguments: str) -> str:
    """The answer for a program, not shown."""
    json_wanted = [] if arguments[0] == "logs" else ["--format", "json"]
    return hypeman(*json_wanted, *arguments, quiet=True)


def push_image(folder: Path, *, script: str = SCRIPT, files: Iterable[Path] = ()) -> None:
    """One layer: busybox, its names as symbolic links, and ``files`` of this host."""
    layer = folder / "layer.tar"
    names = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(layer, "w") as tar:
        for directory in ("bin", "tmp", "proc", "sys", "dev", "etc"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if directory == "tmp" else 0o755
            tar.addfile(entry)
        program = Path("/bin/busybox").read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(program), 0o755
        tar.addfile(entry, io.BytesIO(program))
        for name in names:
            entry = tarfile.TarInfo(f"bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            if name != "busybox":
                tar.addfile(entry)
        for file in files:
            tar.add(file.resolve(), arcname=str(file).lstrip("/"))
    layout = f"{folder}/layout"
    for command in (
        ["umoci", "init", "--layout", layout],
        ["umoci", "new", "--image", f"{layout}:demo"],
        ["umoci", "raw", "add-layer", "--image", f"{layout}:demo", str(layer)],
        ["umoci", "config", "--image", f"{layout}:demo", "--config.env", "PATH=/bin"]
        + [part for word in ("/bin/sh", "-c", script) for part in ("--config.cmd", word)],
        ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:demo", f"docker://{IMAGE}"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_registry_config(folder: Path) -> Path:
    config = folder / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\nhttp: {{addr: '{REGISTRY}'}}\n"
    )
    return config


@contextmanager
def started(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(what: str, condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"not {what}: it ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.05)


def check_nothing_is_left(folder: Path) -> None:
    left = [
        Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        for entry in os.listdir("/proc")
        if entry.isdigit() and b"qemu" in Path("/proc", entry, "cmdline").read_bytes()
    ]
    assert not left, f"VMs are still running: {left}"
    left = [str(path) for path in folder.glob("data/instances/*")]
    assert not left, f"left over: {left}"


if __name__ == "__main__":
    sys.exit(main())
