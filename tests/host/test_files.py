"""Files on a real file system: whole or not there, holes kept, removal that may repeat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypeman.host.files import Files, HostError


async def test_a_written_file_is_whole_and_private(tmp_path: Path) -> None:
    await Files().write(tmp_path / "a", b"one")
    await Files().write(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["a"]


async def test_copies_keep_holes_and_content(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with open(source, "wb") as file:
        file.truncate(64 << 20)
        for place in (0, 1 << 20, (64 << 20) - 5):
            file.seek(place)
            file.write(b"hello")
    await Files().copy(source, tmp_path / "target")
    target = tmp_path / "target"
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20


async def test_copying_a_file_of_holes(tmp_path: Path) -> None:
    await Files().make_sparse(tmp_path / "a", 1 << 30)
    await Files().copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").stat().st_size == 1 << 30
    assert (tmp_path / "b").stat().st_blocks == 0


async def test_a_failed_copy_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="none"):
        await Files().copy(tmp_path / "none", tmp_path / "target")
    assert os.listdir(tmp_path) == []


async def test_all_files_of_a_kind_are_copied_or_moved(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("a.raw", "b.raw", "log"):
        (source / name).write_text(name)
    await Files().copy_all(source, target, "*.raw")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a.raw": "a.raw", "b.raw": "b.raw"}
    (source / "a.raw").write_text("newer")
    for _ in range(2):
        await Files().move_all(source, target, "*.raw")
        assert os.listdir(source) == ["log"]
        assert {path.name: path.read_text() for path in target.iterdir()} == {"a.raw": "newer", "b.raw": "b.raw"}


async def test_removing_may_repeat(tmp_path: Path) -> None:
    tree = tmp_path / "tree" / "deep"
    tree.mkdir(parents=True)
    (tree / "file").write_text("x")
    os.symlink("/etc", tmp_path / "tree" / "link")
    for _ in range(2):
        await Files().remove(tmp_path / "tree")
    assert os.listdir(tmp_path) == []
    assert Path("/etc/passwd").exists()


async def test_a_link_is_removed_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    os.symlink(tmp_path / "kept", tmp_path / "link")
    await Files().remove(tmp_path / "link")
    assert (tmp_path / "kept" / "file").exists()


async def test_publish(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x").write_text("x")
    await Files().publish(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "x").read_text() == "x"


async def test_directories_let_vmm_users_pass(tmp_path: Path) -> None:
    await Files().make_dir(tmp_path / "a" / "b", mode=0o700)
    await Files().make_dir(tmp_path / "a" / "b", mode=0o700)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o711
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
