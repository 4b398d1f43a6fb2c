"""What this machine has: CPUs, memory, disk, the speed of a link. Read, never changed."""

from __future__ import annotations

import os
from pathlib import Path


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Memory of the host, from proc(5)."""
    return _memory("MemTotal:")


def available_memory_bytes() -> int:
    """What of it new programs could have without swapping."""
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


def link_speed(name: str) -> int:
    """Bytes per second of a network link; 0 where it does not tell (virtual links)."""
    try:
        megabits = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return 0
    return max(0, megabits) * 1_000_000 // 8
