"""The real server, whose VMMs were taken over: ``python -m tests.walls.harried FILE``.

At each moment at which tests/real/killable.py would strike (before and after every commit, every effect on the world,
every order to a VMM) it waits until the VMMs that run have tried everything that they can, once from the beginning to
the end (``hostile.c``). So no moment of an operation goes by without an attack. FILE lists the moments, each with the
number of VMMs that were waited for.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from hypeman import app
from hypeman.config import load_config
from hypeman.paths import Paths
from tests.real.killable import Bomb, arm
from tests.walls.hostile_vmm import FAR

_LIMIT = 0.3
"""Seconds that a moment waits for a VMM which does not go round: it has not begun yet, or is being killed."""
_POLL = 0.002


class Moments(Bomb):
    """Never strikes."""

    def __init__(self, file: Path, paths: Paths) -> None:
        self._told = file
        self._paths = paths
        self._one_by_one = threading.RLock()

    def strikes(self, kind: str, where: str) -> bool:
        if kind == "vmm":  # one of the kinds is enough: they have their moments in common
            with self._one_by_one:
                met = self._wait_rounds()
                with open(self._told, "a") as file:
                    file.write(f"{met} {where}\n")
        return False

    def _wait_rounds(self) -> int:
        """How many VMMs went round once."""
        running = [path.name for path in self._paths.vms.iterdir()] if self._paths.vms.is_dir() else []
        before = {name: number for name in running if (number := self._round(name)) >= 0}
        deadline = time.monotonic() + _LIMIT
        waiting = set(before)
        while waiting and time.monotonic() < deadline:
            time.sleep(_POLL)
            # the first one that ends had begun before this moment
            waiting = {name for name in waiting if 0 <= self._round(name) < before[name] + 2}
        return len(before) - len(waiting)

    def _round(self, instance: str) -> int:
        """The last round of its VMM; negative if there was none."""
        try:
            return int(self._paths.instance(instance).boot_disk.stat().st_atime) - FAR
        except OSError:
            return -1


if __name__ == "__main__":
    config = load_config()
    arm(Moments(Path(sys.argv[1]), config.paths))
    app.main(config)
