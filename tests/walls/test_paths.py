"""Rule 1: root follows no path that another user can change: each name and each kind of thing planted there."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hypeman.host import safe_open
from hypeman.host.files import Files, HostError
from hypeman.host.ownership import repair
from hypeman.host.safe_open import open_beneath, open_directory, open_log, open_regular, read_start

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="requires root: gives files to other users")
VMM_UID = 510017
SECRET = "another tenant's"

Plant = Callable[[Path, Path], None]


def symlink(name: Path, victim: Path) -> None:
    name.symlink_to(victim)


def fifo(name: Path, victim: Path) -> None:
    os.mkfifo(name)


def directory(name: Path, victim: Path) -> None:
    name.mkdir()


def unix_socket(name: Path, victim: Path) -> None:
    here = os.open(name.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"/proc/self/fd/{here}/{name.name}")
    os.close(here)


PLANTS: list[Plant] = [symlink, fifo, directory, unix_socket]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text(SECRET)
    return file


@pytest.fixture(params=["openat2", "openat"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With openat2, and as on a kernel without."""
    if request.param == "openat":
        monkeypatch.setattr(safe_open, "_OPENAT2", 999)
    return str(request.param)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_no_open_follows_or_waits_for_what_was_planted(plant: Plant, victim: Path, tmp_path: Path, kernel: str) -> None:
    name = tmp_path / "app.log"
    plant(name, victim)
    for flags in (os.O_RDONLY, os.O_WRONLY | os.O_APPEND | os.O_CREAT, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(OSError, match=r"app\.log"):
            open_log(name, flags)
        with pytest.raises(OSError, match=r"app\.log"):
            open_regular(name, flags)
    with pytest.raises(OSError, match=r"app\.log"):
        read_start(name, 100)
    assert victim.read_text() == SECRET


def test_a_log_is_a_file_and_blocks_like_one(tmp_path: Path, kernel: str) -> None:
    descriptor = open_log(tmp_path / "new.log")
    os.write(descriptor, b"line\n")
    os.close(descriptor)
    assert (tmp_path / "new.log").read_text() == "line\n"
    assert stat.S_IMODE((tmp_path / "new.log").stat().st_mode) == 0o600
    assert read_start(tmp_path / "new.log", 3) == b"lin"


def test_a_log_with_more_names_than_a_jail_needs_is_refused(victim: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).hardlink_to(victim)
    with pytest.raises(OSError, match="other names"):
        open_log(victim)


def test_what_is_opened_lies_beneath_the_directory(victim: Path, tmp_path: Path, kernel: str) -> None:
    inside = tmp_path / "inside"
    (inside / "real").mkdir(parents=True)
    (inside / "real" / "file").write_text("ours")
    (inside / "out").symlink_to(tmp_path)
    (inside / "alias").symlink_to("real")
    here = open_directory(inside)
    try:
        os.close(open_beneath(here, "real/file", os.O_RDONLY))
        for name in ("../victim", "out/victim", "alias/file", str(victim), "real/../../victim"):
            with pytest.raises(OSError):
                open_beneath(here, name, os.O_RDONLY)
    finally:
        os.close(here)
    with pytest.raises(OSError):
        open_directory(inside / "alias")


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
async def test_no_copy_comes_from_what_was_planted(plant: Plant, victim: Path, tmp_path: Path) -> None:
    """The first row of the table: a log that is rotated, a disk that is copied for a fork."""
    plant(tmp_path / "vmm.log", victim)
    with pytest.raises(HostError):
        await Files().copy(tmp_path / "vmm.log", tmp_path / "vmm.log.1")
    assert not (tmp_path / "vmm.log.1").exists()


@pytest.mark.parametrize("plant", [symlink, fifo], ids=lambda plant: plant.__name__)
async def test_a_directory_is_made_in_the_place_of_nothing_else(plant: Plant, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    plant(tmp_path / "logs", other)
    with pytest.raises(HostError):
        await Files().make_dir(tmp_path / "logs", mode=0o711)
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


# Data directories of older versions


class Old:
    """What an older version left: the VMM's user owns everything of instance a; b is another's."""

    def __init__(self, directory: Path) -> None:
        self.data, self.run = directory / "data", directory / "run"
        self.a, self.b = self.data / "instances" / "a", self.data / "instances" / "b"
        self.logs, self.capture, self.vm = self.a / "logs", self.data / "captures" / "c", self.run / "vm" / "a"
        for each, owner in ((self.a, VMM_UID), (self.b, VMM_UID + 1), (self.capture, VMM_UID), (self.vm, VMM_UID)):
            each.mkdir(parents=True)
            (each / "own").write_text("own")
            os.chown(each / "own", owner, owner)
            os.chown(each, owner, owner)
        self.logs.mkdir()
        os.chown(self.logs, VMM_UID, VMM_UID)

    def repair(self) -> set[str]:
        return {os.path.basename(path) for path in repair(self.data, self.run)}


@pytest.fixture
def old(tmp_path: Path) -> Old:
    return Old(tmp_path)


@as_root
def test_directories_become_roots_and_keep_their_files(old: Old) -> None:
    assert old.repair() == {"own"}, "the one in the runtime directory, where VMMs have only sockets"
    for _ in range(2):
        for each in (old.a, old.logs, old.capture, old.vm):
            found = each.stat()
            assert (found.st_uid, found.st_gid) == (0, 0) and not found.st_mode & 0o022, each
        assert (old.a / "own").read_text() == "own" and (old.capture / "own").read_text() == "own"
        assert old.repair() == set()


@as_root
@pytest.mark.parametrize("where", ["a", "logs", "capture", "vm"])
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_what_was_planted_is_removed(plant: Plant, where: str, old: Old, victim: Path) -> None:
    place: Path = getattr(old, where)
    plant(place / "planted", victim)
    os.chown(place / "planted", VMM_UID, VMM_UID, follow_symlinks=False)
    removed = old.repair()
    of_a_living_vmm = plant is unix_socket and where == "vm"
    assert ("planted" in removed) is not of_a_living_vmm
    assert os.path.lexists(place / "planted") is of_a_living_vmm
    assert victim.read_text() == SECRET and victim.stat().st_uid == os.geteuid()


@as_root
def test_another_instances_disk_under_a_planted_name_is_released_and_kept(old: Old) -> None:
    (old.a / "overlay.raw").hardlink_to(old.b / "own")
    assert "overlay.raw" in old.repair()
    assert not (old.a / "overlay.raw").exists() and (old.b / "own").read_text() == "own"
    assert (old.b / "own").stat().st_uid == VMM_UID + 1


@as_root
@pytest.mark.parametrize("name", ["logs", "staged", "jail"])
def test_a_known_directory_that_is_a_link_is_removed(name: str, old: Old, victim: Path) -> None:
    if name == "logs":
        old.logs.rmdir()
    (old.a / name).symlink_to(victim.parent)
    old.repair()
    assert not os.path.lexists(old.a / name)


@as_root
def test_an_instance_that_is_a_link_is_removed(old: Old) -> None:
    (old.data / "instances" / "link").symlink_to(old.b)
    assert "link" in old.repair()
    assert (old.b / "own").exists()


@as_root
def test_a_second_repair_removes_nothing(old: Old) -> None:
    """Directories are root's by then, and their files still the VMM's."""
    old.repair()
    (old.a / "overlay.raw").write_text("disk")
    os.chown(old.a / "overlay.raw", VMM_UID, VMM_UID)
    assert old.repair() == set()
    assert (old.a / "overlay.raw").read_text() == "disk"
