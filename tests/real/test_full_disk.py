"""Every operation with next to no room in the data directory: a small ext4 of its own, filled but for a little.

It fails with a clear error or it works; either way all is whole once there is room again, and a VM that ran still runs.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.real.appliance import Appliance, check_host, running_appliance, short_directory
from tests.real.operations import OPERATIONS, check_clear, check_whole, clean_up, wait_at_rest

pytestmark = [pytest.mark.real, pytest.mark.slow]

SIZE = 512 << 20
ROOM = (0, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 32 << 20)
"""Bytes that are left; a capture of these guests takes some 40 MB."""


class SmallDisk:
    """An ext4 of ``SIZE`` at ``path``."""

    def __init__(self, path: Path) -> None:
        self._image, self._path = path.with_suffix(".img"), path
        with open(self._image, "wb") as file:
            file.truncate(SIZE)
        # Nothing is kept for root, who would have room where others have none.
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", self._image], check=True)
        path.mkdir()
        mounted = subprocess.run(["mount", "-o", "loop", self._image, path], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no loop file system can be mounted here: {mounted.stderr.strip()}")
        (path / "lost+found").rmdir()

    @property
    def _ballast(self) -> Path:
        return self._path / "store" / "ballast"  # where the test that looks for leftovers does not look

    def fill(self, room: int) -> None:
        """Leave ``room`` bytes."""
        with open(self._ballast, "wb") as file:
            for piece in (4 << 20, 64 << 10, 4 << 10):  # the file system's own bookkeeping takes its part
                with contextlib.suppress(OSError):
                    while self._free() - room >= piece:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece)

    def _free(self) -> int:
        reported = os.statvfs(self._path)
        return reported.f_bavail * reported.f_frsize

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", self._path], check=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("full")


@pytest.fixture
def disk(directory: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(directory / "data")
    yield made
    made.remove()


@pytest.fixture
async def appliance(directory: Path, disk: SmallDisk) -> AsyncIterator[Appliance]:
    # A busy machine is no answer, and volumes larger than the disk must get as far as the disk.
    settings = {"REQUEST_TIMEOUT": "600", "OVERSUBSCRIPTION__DISK": "1000"}
    async with running_appliance(directory, **settings) as started:
        yield started


@pytest.mark.parametrize("rooms", [ROOM] if os.environ.get("FULL_DISK") == "all" else [(random.choice(ROOM),)])
async def test_operations_on_a_full_disk(appliance: Appliance, disk: SmallDisk, rooms: tuple[int, ...]) -> None:
    """With room chosen at random, or (FULL_DISK=all) with ever more."""
    for name, operation in OPERATIONS.items():
        reported = []
        for room in rooms:
            await operation.prepare(appliance)
            disk.fill(room)
            answer = await operation.act(appliance)
            disk.empty()
            where = f"{name} with {room} bytes left: {answer.status_code} {answer.text}"
            check_clear(answer, where)
            reported.append(f"{room >> 10} KB {answer.status_code}")
            where += f"\n{appliance.log_tail()}"
            await wait_at_rest(appliance, operation.states, where)
            await check_whole(appliance, where)
            await clean_up(appliance)
            appliance.log.write_text("")
        print(f"\n{name}: {', '.join(reported)}")
