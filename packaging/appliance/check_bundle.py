"""``check_bundle.py BUNDLE``: does the finished bundle start, serve, and stop, and without anything of this machine's?

- Every library that a bundled object names is in the bundle, with the symbols and versions that it wants.
- The command answers in a root directory in which there is nothing else: no C library, no shell, no /etc.
- The doctor reports there, too: it imports modules that nothing else does.
- A server started from the bundle with an empty environment answers /health, has mapped no file from outside the bundle
  for execution, was executed once, and ends by SIGTERM with code 0. It runs in a network namespace of its own, since a
  server sets up an address, nftables tables and forwarding, which the machine that builds must not keep.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bring_c_library import INSIDE, PROGRAM, dynamic_objects, loader_of

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE = 60

_ALONE = """
set -e
mount -t tmpfs none "$1"
mkdir "$1/bundle" "$1/proc" "$1/dev"
mount --rbind /proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --bind "$2" "$1/bundle"
cd "$1"
shift 2
exec chroot . /bundle/hypeman "$@"
"""


def check_closed(bundle: Path) -> None:
    """What the bundled loader says of each object: all libraries found, and found in the bundle."""
    folder = bundle.resolve() / INSIDE
    loader = folder / loader_of(folder / PROGRAM).name
    objects = dynamic_objects(bundle.resolve())
    wrong = []
    for path in objects:
        argv = [loader, "--inhibit-cache", "--library-path", folder, "--list", path]
        result = subprocess.run(argv, env={"LD_WARN": "yes"}, capture_output=True, text=True, check=False)
        outside = [found for found in re.findall(r"=> (/\S+)", result.stdout) if not Path(found).is_relative_to(folder)]
        if result.returncode != 0 or result.stderr or outside:
            wrong.append(f"{path.relative_to(bundle.resolve())}: {outside or result.stderr.strip()}")
    if wrong:
        raise SystemExit("check_bundle: not all that is wanted is in the bundle:\n" + "\n".join(wrong))
    print(f"  {len(objects)} objects find their libraries in the bundle")


def run_alone(bundle: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a root directory in which there are only the bundle, /proc and /dev."""
    with tempfile.TemporaryDirectory(prefix="hypeman-check.") as folder:
        apart = ["unshare", "--mount", "--propagation", "private", *(["--map-root-user"] if os.geteuid() else []), "--"]
        argv = [*apart, "sh", "-c", _ALONE, "sh", folder, bundle, *words]
        environment = {"PATH": PATH, "HOME": "/", "LC_ALL": "C.UTF-8", **variables}
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)


def check_command(bundle: Path) -> None:
    result = run_alone(bundle, "--version")
    if result.returncode != 0:
        raise SystemExit(f"check_bundle: hypeman --version failed:\n{result.stdout}{result.stderr}")
    print(f"  {result.stdout.strip()}, in an empty root")


def check_doctor(bundle: Path) -> None:
    """Its findings, whatever they are: a module that is missing in the bundle shows only when it is imported."""
    result = run_alone(bundle, "--format", "json", "doctor", HYPERVISOR__ACCELERATOR="tcg")
    if result.returncode not in (0, 1) or not result.stdout.startswith("["):
        raise SystemExit(f"check_bundle: hypeman doctor failed:\n{result.stdout}{result.stderr}")


def foreign_code(pid: int, bundle: Path) -> list[str]:
    """Files outside ``bundle`` that a process has mapped for execution."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        _, rights, _, _, _, *path = line.split(maxsplit=5)
        if "x" in rights and path and path[0].startswith("/") and not Path(path[0]).is_relative_to(bundle.resolve()):
            found.add(path[0])
    return sorted(found)


def check_server(program: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hypeman-check.") as folder:
        environment = {
            "PATH": PATH,
            "DATA_DIR": f"{folder}/data",
            "RUN_DIR": f"{folder}/run",
            "PORT": "0",
            "JWT_SECRET": "a secret that is for this check only",
            "METRICS__ENABLED": "false",
        }
        address = f"{folder}/run/hypeman.sock"
        log = Path(folder, "log")
        isolated = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else []), "--"]
        begin = time.perf_counter()
        with log.open("wb") as output:
            server = subprocess.Popen(
                [*isolated, "sh", "-c", 'ip link set lo up && exec "$0" serve', program],
                env=environment,
                stdout=output,
                stderr=output,
            )
        try:
            while (answer := ask_health(address)) is None:
                if server.poll() is not None or time.perf_counter() - begin > PATIENCE:
                    raise SystemExit(f"check_bundle: the server does not answer:\n{log.read_text()}")
                time.sleep(0.02)
            print(f"  /health answered after {(time.perf_counter() - begin) * 1000:.0f} ms: {answer}")
            if foreign := foreign_code(server.pid, program.parent):
                raise SystemExit(f"check_bundle: the server runs code of this machine: {foreign}")
            names = Path(f"/proc/{server.pid}/environ").read_bytes()
            if b"LD_LIBRARY_PATH" in names:
                raise SystemExit("check_bundle: PyInstaller's bootloader has executed the program again: see ext/start")
            server.send_signal(signal.SIGTERM)
            code = server.wait(PATIENCE)
            if code != 0:
                raise SystemExit(f"check_bundle: the server ended with {code}:\n{log.read_text()}")
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()


def ask_health(address: str) -> str | None:
    """The body of the answer; None while nobody serves."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
        except OSError:
            return None
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
        except ConnectionError:  # it listens, but does not serve yet
            return None
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise SystemExit(f"check_bundle: /health said {head!r}")
    return body.decode().strip()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    check_closed(folder)
    check_command(folder)
    check_doctor(folder)
    check_server(folder / "hypeman")
