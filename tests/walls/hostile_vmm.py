"""Makes a QEMU that was taken over (``hostile.c``), and says what must not change whatever it does."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import pytest

from hypeman.host.program_files import files_of

SOURCE = Path(__file__).with_name("hostile.c")
FAR = 4102444800
"""Access time of a disk after round 0 of the attacks."""
QEMU = shutil.which("qemu-system-x86_64") or ""


def build(folder: Path) -> Path:
    """The program for ``hypervisor.qemu_binary``. It is linked with QEMU's libraries, so that they are in its root."""
    compiler = shutil.which("gcc")
    if compiler is None or not QEMU:
        pytest.skip("requires gcc and qemu-system-x86_64")
    qemu = os.path.realpath(QEMU)
    modules = os.path.dirname((glob.glob("/usr/lib*/*/qemu/*.so") or ["/usr/lib/qemu/none"])[0])
    library, program = folder / "hostile.so", folder / "hostile-qemu"
    common = [compiler, "-O1", "-Wall", "-Werror", "-Wno-stringop-truncation", "-pthread"]
    subprocess.run([*common, "-DLIBRARY", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    libraries = [path for path in files_of(qemu) if path != qemu and "/ld-linux" not in path]
    defines = [f'-DQEMU="{qemu}"', f'-DHOSTILE="{library}"', f'-DMODULES="{modules}"']
    link = ["-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", *libraries]
    subprocess.run([*common, "-DWRAPPER", *defines, "-o", program, SOURCE, *link], check=True)
    program.chmod(0o755)
    return program


class Entry(NamedTuple):
    """All of a file but when it was read."""

    kind: int
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    changed: int
    content: str


def picture(*places: Path, read: Container[str] | None = None) -> dict[str, Entry]:
    """Everything in and below ``places``. Of files that are not in ``read`` the content is left out: an attacker's
    would keep us waiting (a lease)."""
    found: dict[str, Entry] = {}
    for place in places:
        for path in (place, *sorted(place.rglob("*"))):
            status = path.lstat()
            whole = stat.S_ISREG(status.st_mode)
            known = read is None or str(path) in read
            found[str(path)] = Entry(
                status.st_mode >> 12,
                status.st_mode & 0o7777,
                status.st_uid,
                status.st_gid,
                status.st_nlink if whole else 0,
                status.st_size if whole else 0,
                status.st_mtime_ns,
                _digest(str(path), status.st_ctime_ns, status.st_size) if whole and known else "",
            )
    return found


def differences(before: dict[str, Entry], after: dict[str, Entry]) -> list[str]:
    """What was changed or removed; what is new is not listed."""
    return [f"{path}: {entry} became {after.get(path)}" for path, entry in before.items() if after.get(path) != entry]


@functools.lru_cache(maxsize=4096)
def _digest(path: str, *version: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
