"""What wears out a host's flash: bytes written to the disk below ``/var/lib/hypeman`` while nothing happens, and for
each instance that is created, with a real guest, and deleted.

The disk is an ext4 file system of its own on a loop device, whose counter of sectors includes the journal and what
the VMMs write. The peer of the idle server is the same file system without one.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.bench_instances import import_image, server
from tests.bench.harness import Result
from tests.real.appliance import IMAGE, Namespace, short_directory

IDLE = 120.0
"""Seconds; long enough for several rounds of the kernel's write-back."""
ROUNDS = 4
SECTOR = 512


class Disk:
    """A file system below ``mounted`` that counts what is written to it."""

    def __init__(self, device: str) -> None:
        self._stat = Path("/sys/class/block", Path(device).name, "stat")

    def written(self) -> int:
        """Bytes so far, everything that is still in memory included."""
        subprocess.run(["sync"], check=True)
        return int(self._stat.read_text().split()[6]) * SECTOR

    def while_idle(self, seconds: float) -> float:
        """MB an hour."""
        before = self.written()
        time.sleep(seconds)
        return (self.written() - before) / 1e6 / seconds * 3600


@contextmanager
def disk(directory: Path) -> Iterator[Disk]:
    image, mounted = directory / "disk", directory / "data"
    mounted.mkdir()
    subprocess.run(["truncate", "--size=8G", image], check=True)
    # initialised at once: else the kernel does it while we count
    options = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run(["mkfs.ext4", "-q", "-E", options, image], check=True)
    attach = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["mount", device, mounted], check=True)
        try:
            yield Disk(device)
        finally:
            subprocess.run(["umount", mounted], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def run() -> list[Result]:
    for directory in short_directory("writes"):
        directory.chmod(0o755)
        namespace = Namespace()
        try:
            with disk(directory) as written_to:
                return _measure(written_to, directory, namespace)
        finally:
            namespace.remove()
    raise AssertionError


def _measure(written_to: Disk, directory: Path, namespace: Namespace) -> list[Result]:
    empty = written_to.while_idle(IDLE / 4)
    creates, deletes = [], []
    with server(directory, namespace, "hypeman serve") as (client, _, _):
        import_image(client)
        idle = written_to.while_idle(IDLE)
        body = {"name": "vm", "image": IMAGE, "size": "128MB", "vcpus": 1, "overlay_size": "1GB"}
        for last in (*[False] * ROUNDS, True):
            before = written_to.written()
            client.ask("POST", "/instances", body)
            client.ask("GET", "/instances/vm/wait?state=Running&timeout=120s")
            created = written_to.written()
            creates.append((created - before) / 1e6)
            if last:
                with_vm = written_to.while_idle(IDLE)
                created = written_to.written()
            client.ask("DELETE", "/instances/vm")
            deletes.append((written_to.written() - created) / 1e6)
    return [
        Result("writes: idle server, an hour", idle, "MB", "the file system alone", empty),
        Result("writes: one idle instance, an hour", with_vm, "MB"),
        Result("writes: create to running", statistics.median(creates), "MB"),
        Result("writes: delete", statistics.median(deletes), "MB"),
    ]
