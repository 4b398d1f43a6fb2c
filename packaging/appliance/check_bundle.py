"""``check_bundle.py BUNDLE``: does the finished bundle start, serve, and stop; on which hosts will it run?

- The command answers, and a server started from the bundle with an empty environment answers /health
  and ends by SIGTERM with code 0. It runs in a network namespace of its own, since a server sets up an address,
  nftables tables and forwarding, which the machine that builds must not keep.
- The doctor reports: it imports modules that nothing else does.
- No bundled object needs a newer C library than GLIBC, which README promises.
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

GLIBC = tuple(map(int, os.environ.get("HYPEMAN_GLIBC", "2.36").split(".")))
"""Debian 12, unless the build is for another system. README says so."""

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE = 60


def glibc_needs(bundle: Path) -> dict[str, tuple[int, ...]]:
    """Object below ``bundle`` → the newest version of the C library that it names; not the guest kernel."""
    needs = {}
    for path in sorted(bundle.rglob("*")):
        name = str(path.relative_to(bundle))
        if path.is_symlink() or not path.is_file() or "assets" in path.parts or not _is_elf(path):
            continue
        said = subprocess.run(["readelf", "-W", "-V", str(path)], capture_output=True, text=True, check=True).stdout
        versions = [tuple(map(int, each.split("."))) for each in re.findall(r"GLIBC_(\d+(?:\.\d+)+)", said)]
        needs[name] = max(versions, default=(0,))
    return needs


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def check_glibc(bundle: Path) -> None:
    needs = glibc_needs(bundle)
    name = max(needs, key=needs.__getitem__)
    print(f"  needs glibc {'.'.join(map(str, needs[name]))} (for {name})")
    if needs[name] > GLIBC:
        raise SystemExit(f"check_bundle: newer than the promised {'.'.join(map(str, GLIBC))}")


def check_command(program: Path) -> None:
    begin = time.perf_counter()
    done = subprocess.run([program, "--version"], env={"PATH": PATH}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"check_bundle: hypeman --version failed:\n{done.stdout}{done.stderr}")
    print(f"  {done.stdout.strip()}, answered in {(time.perf_counter() - begin) * 1000:.0f} ms")


def check_doctor(program: Path) -> None:
    """Its findings, whatever they are: a module that is missing in the bundle shows only when it is imported."""
    argv = [program, "--format", "json", "doctor"]
    environment = {"PATH": PATH, "HYPERVISOR__ACCELERATOR": "tcg"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.startswith("["):
        raise SystemExit(f"check_bundle: hypeman doctor failed:\n{done.stdout}{done.stderr}")


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
    check_glibc(folder)
    check_command(folder / "hypeman")
    check_doctor(folder / "hypeman")
    check_server(folder / "hypeman")
