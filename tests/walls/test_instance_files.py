"""What a VMM could put in the place of an instance's files: the server follows, waits for and reads none of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypeman.guest import boot
from hypeman.instances.machine import logs
from hypeman.instances.model.types import StandbyInstanceRequest
from hypeman.paths import Paths
from hypeman.store import Store
from tests.instances.fake_world import Lab
from tests.instances.situations import running


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


async def test_the_journal_follows_no_link_and_waits_for_no_reader(lab: Lab, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("root's")
    async with lab.running() as instances:
        await running(lab, instances)
        instance = instances.board.find("one").id
        log = lab.paths.instance(instance).log("hypeman")
        for planted in ("link", "FIFO"):
            log.unlink()
            log.symlink_to(victim) if planted == "link" else os.mkfifo(log)
            instances.machine.journal(instance, "a line")  # blocked without end on a FIFO, wrote through a link
            assert victim.read_text() == "root's", planted
            log.unlink()
            instances.machine.journal(instance, "a line")
            assert log.read_text().endswith("a line\n")


async def test_of_an_enlarged_boot_disk_only_the_known_length_is_read(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    monkeypatch.setattr(logs, "parse_outcome", lambda content, nonce: lengths.append(len(content)))
    async with lab.running() as instances:
        await running(lab, instances)
        instance = instances.board.find("one").id
        os.truncate(lab.paths.instance(instance).boot_disk, 64 << 20)
        await instances.machine.read_outcome(instance)
    assert lengths == [boot.MAX_BOOT_DISK]


async def test_directories_of_an_instance_and_its_capture_are_the_servers(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        record = instances.board.find("one")
        mine = lab.paths.instance(record.id)
        directories = [mine.root, mine.logs, mine.run]
        await instances.standby("one", StandbyInstanceRequest())
        capture = instances.board.find("one").capture
        assert capture is not None
        for directory in (*(path for path in directories if path.exists()), lab.paths.capture(capture)):
            status = directory.stat()
            assert status.st_uid == os.geteuid() and not status.st_mode & 0o022, directory
