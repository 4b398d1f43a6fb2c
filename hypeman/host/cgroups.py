"""One control group for each VMM, below a directory that is ours.

Under systemd that directory belongs to ``hypeman-vms.service``, whose subtree is delegated to us; it
runs only a sleeping process in the group ``keeper``, so that systemd keeps the directory. It is a separate
unit from the server's, so stopping, restarting or upgrading the server does not affect any VMM, and
``systemctl stop hypeman-vms`` ends them all.
Without systemd it is ``/sys/fs/cgroup/hypeman``. Where the host has no cgroup v2, or none for us,
there are no groups and VMMs run without these limits; ``doctor`` reports it.

Invariants: a group is named after its VM and is removed after its last process; ``remove_strays``
finds groups that a killed server left behind by their names. Creating one takes 0.1 ms, without a
message to systemd or a process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection
from pathlib import Path

from hypeman.errors import InternalError

UNDER_SYSTEMD = Path("/sys/fs/cgroup/hypeman.slice/hypeman-vms.service")
ALONE = Path("/sys/fs/cgroup/hypeman")

_CONTROLLERS = ("cpu", "memory", "pids")
_PERIOD = 100_000
_VMM_MEMORY = 256 * 1024 * 1024
"""For the VMM on top of the guest's memory: 110 MB measured for QEMU with TCG, including a mapped kernel."""
_VMM_TASKS = 1024


def render_limits(vcpus: int, memory: int) -> dict[str, str]:
    """Control group files and the values to write, for a VM of ``vcpus`` and ``memory`` bytes.

    The VMM gets half a CPU more than the guest, for emulated devices and I/O threads, and some memory
    on top of the guest's. If that is exceeded the whole VM is killed, not single processes of it.
    """
    return {
        "cpu.max": f"{vcpus * _PERIOD + _PERIOD // 2} {_PERIOD}",
        "cpu.weight": str(min(10_000, 100 * vcpus)),
        "memory.max": str(memory + max(_VMM_MEMORY, memory // 16)),
        "memory.oom.group": "1",
        "pids.max": str(_VMM_TASKS),
    }


class CGroups:
    """The groups below ``root``; None if this host has none for us."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        if root is not None:
            available = (root / "cgroup.controllers").read_text().split()
            self._controllers = [name for name in _CONTROLLERS if name in available]
            if self._controllers:
                _write(root / "cgroup.subtree_control", " ".join(f"+{name}" for name in self._controllers))

    @classmethod
    def detect(cls) -> CGroups:
        """The groups of this host. Never fails: an unusable hierarchy counts as missing."""
        with contextlib.suppress(OSError):
            if os.access(UNDER_SYSTEMD / "cgroup.procs", os.W_OK):
                return cls(UNDER_SYSTEMD)
            if not Path("/run/systemd/system").exists() and (ALONE.parent / "cgroup.controllers").exists():
                ALONE.mkdir(exist_ok=True)
                return cls(ALONE)
        return cls(None)

    def make(self, name: str, *, vcpus: int, memory: int) -> str:
        """Create the group ``name`` if missing, set its limits and return its directory; "" without groups.

        Raises InternalError if the kernel refuses.
        """
        if self.root is None:
            return ""
        group = self.root / name
        try:
            group.mkdir(exist_ok=True)
            for file, text in render_limits(vcpus, memory).items():
                if file.partition(".")[0] in self._controllers:
                    _write(group / file, text)
        except OSError as error:
            raise InternalError(f"the control group of {name} cannot be set up: {error}") from error
        return str(group)

    def cpu_seconds(self, name: str) -> float | None:
        """CPU time of all processes that the group ``name`` has had; None without the group."""
        if self.root is None:
            return None
        try:
            lines = (self.root / name / "cpu.stat").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("usage_usec ")), None)

    def remove(self, name: str) -> bool:
        """Remove the group ``name``. True if it is gone, False while it still contains a process."""
        if self.root is None:
            return True
        try:
            (self.root / name).rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise InternalError(f"the control group of {name} cannot be removed: {error}") from error
        return True

    def remove_strays(self, keep: Collection[str]) -> list[str]:
        """Remove every empty group that is not in ``keep``; the names of those removed, sorted."""
        if self.root is None:
            return []
        names = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False))
        return [name for name in names if name not in keep and self.remove(name)]


def _write(path: Path, text: str) -> None:
    """Unbuffered, since the kernel reports errors from the write itself."""
    with open(path, "w", buffering=1) as file:
        file.write(text)
