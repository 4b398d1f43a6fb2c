"""The single file: it unpacks itself once, whichever process is first, and runs nothing that others put there."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

HEADER = Path(__file__).parents[2] / "packaging" / "appliance" / "self-extract.sh"


@pytest.fixture
def single_file(tmp_path: Path) -> Path:
    """A program that prints its arguments, packed as the appliance is."""
    payload = io.BytesIO()
    with tarfile.open(fileobj=payload, mode="w:gz") as tar:
        for name, content, mode in (
            ("bundle/hypeman", b'#!/bin/sh\necho "$0 got $*"\n', 0o755),
            ("bundle/data", b"x", 0o644),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
    file = tmp_path / "hypeman-1-linux-amd64"
    file.write_bytes(HEADER.read_bytes().replace(b"@IDENTITY@", b"1-abc") + payload.getvalue())
    file.chmod(0o755)
    return file


def run(file: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run([file, *arguments], env=environment, capture_output=True, text=True, timeout=30)


def test_unpacks_once_and_passes_arguments_on(single_file: Path, tmp_path: Path) -> None:
    base = tmp_path / "unpacked"
    first = run(single_file, "ps", "--all", HYPEMAN_UNPACK_DIR=str(base))
    assert first.stdout == f"{base}/1-abc/hypeman got ps --all\n", first.stderr
    before = (base / "1-abc").stat().st_ctime_ns
    assert run(single_file, HYPEMAN_UNPACK_DIR=str(base)).returncode == 0
    assert (base / "1-abc").stat().st_ctime_ns == before
    assert [path.name for path in base.iterdir()] == ["1-abc"], "no half-unpacked directory is left"


def test_many_at_once(single_file: Path, tmp_path: Path) -> None:
    base = tmp_path / "unpacked"
    environment = {"PATH": "/usr/bin:/bin", "HYPEMAN_UNPACK_DIR": str(base)}
    running = [subprocess.Popen([single_file], env=environment, stdout=subprocess.DEVNULL) for _ in range(8)]
    assert [process.wait(30) for process in running] == [0] * 8
    assert [path.name for path in base.iterdir()] == ["1-abc"]


def test_its_own_exit_code_comes_through(single_file: Path, tmp_path: Path) -> None:
    base = tmp_path / "unpacked"
    run(single_file, HYPEMAN_UNPACK_DIR=str(base))
    (base / "1-abc" / "hypeman").write_text("#!/bin/sh\nexit 42\n")
    assert run(single_file, HYPEMAN_UNPACK_DIR=str(base)).returncode == 42


def test_a_directory_that_cannot_be_created_is_reported(single_file: Path) -> None:
    refused = run(single_file, HYPEMAN_UNPACK_DIR="/proc/nowhere")
    assert refused.returncode != 0
    assert "/proc/nowhere" in refused.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to another user")
@pytest.mark.parametrize("how", ["base", "above", "link", "unpacked", "writable", "unpacked writable"])
def test_a_program_that_another_user_could_exchange_is_not_run(single_file: Path, tmp_path: Path, how: str) -> None:
    """Not even by root, who could read and run anything: above all not by root."""
    base = tmp_path / "above" / "unpacked"
    unpacked = base / "1-abc"
    unpacked.mkdir(parents=True)
    program = unpacked / "hypeman"
    program.write_text("#!/bin/sh\necho taken over\n")
    program.chmod(0o755)
    chosen = base
    match how:
        case "base":
            os.chown(base, 12345, 12345)
        case "above":
            os.chown(base.parent, 12345, 12345)
        case "link":
            chosen = tmp_path / "link"
            chosen.symlink_to(base)
            os.chown(base.parent, 12345, 12345)
        case "unpacked":
            os.chown(unpacked, 12345, 12345)
        case "writable":
            base.chmod(0o777)
        case "unpacked writable":
            unpacked.chmod(0o775)
    refused = run(single_file, HYPEMAN_UNPACK_DIR=str(chosen))
    assert refused.returncode != 0
    assert "taken over" not in refused.stdout
    assert "HYPEMAN_UNPACK_DIR" in refused.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to another user")
def test_nothing_is_unpacked_into_a_directory_of_another_user(single_file: Path, tmp_path: Path) -> None:
    base = tmp_path / "unpacked"
    base.mkdir()
    os.chown(base, 12345, 12345)
    assert run(single_file, HYPEMAN_UNPACK_DIR=str(base)).returncode != 0
    assert not list(base.iterdir())
