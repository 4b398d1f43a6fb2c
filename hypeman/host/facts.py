"""The host's resources: CPUs, memory, disk, link speed. Read-only."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Memory of the host, from proc(5)."""
    return _memory("MemTotal:")


def available_memory_bytes() -> int:
    """Memory available to new programs without swapping."""
    return _memory("MemAvailable:")


def _memory(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def disk_bytes(path: Path) -> int:
    """Size of the file system that ``path`` lies on, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def free_bytes(path: Path) -> int:
    """What is free for users on the file system that ``path`` lies on, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


SPARE_BYTES = 256 << 20
"""Of the disk, what clients cannot fill with what they send: the store, logs and VMs that run need some."""


def room_bytes(path: Path) -> int:
    """What clients may still send to the file system that ``path`` lies on."""
    return max(0, free_bytes(path) - SPARE_BYTES)


def cpu_seconds() -> float:
    """Processor time that everything on the host has used since its boot, from proc(5)."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def booted_at() -> datetime:
    """When the host booted."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return datetime.fromtimestamp(int(line.split()[1]), UTC)
    return datetime.fromtimestamp(0, UTC)


def link_speed(name: str) -> int:
    """Bytes per second of a network link; 0 if it is not reported (virtual links)."""
    try:
        megabits = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return 0
    return max(0, megabits) * 1_000_000 // 8


VMM_UIDS = 65_536
"""User ids from ``uid_base`` on that VMMs may get: as many as a /16 of guests has addresses."""


def uid_conflicts(base: int, *, etc: Path = Path("/etc")) -> list[str]:
    """Who else may use user ids that VMMs get (``base`` to ``base + VMM_UIDS``): accounts of passwd(5), and ranges of
    subuid(5), from which rootless containers take theirs. Empty for ``base`` 0, where VMMs have no users of their own.
    """
    if base == 0:
        return []
    found = []
    for name, _, uid in _rows(etc / "passwd"):
        if base <= uid < base + VMM_UIDS:
            found.append(f"account {name} ({uid})")
    for name, start, count in _rows(etc / "subuid"):
        first = int(start) if start.isdecimal() else 0
        if first and first < base + VMM_UIDS and base < first + count:
            found.append(f"subordinate ids of {name} ({first} to {first + count - 1})")
    return found


def _rows(file: Path) -> list[tuple[str, str, int]]:
    """The first three fields of each line ``a:b:number``; other lines are skipped, and so is a missing file."""
    try:
        rows = [line.split(":") for line in file.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [(row[0], row[1], int(row[2])) for row in rows if len(row) > 2 and row[2].isdecimal()]
