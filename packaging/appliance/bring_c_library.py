"""``bring_c_library.py BUNDLE``: puts into the bundle the C library that its objects were built for.

PyInstaller leaves the C library out, so that a program needs one as new as that of the machine that built it. With
this one and the loader that belongs to it, which ``ext/start`` starts, the bundle runs on any host whose kernel is new
enough.

- Which files: what the objects of the bundle name and the bundle lacks, and libgcc_s, which the C library opens to end
  a thread. No module of NSS: files and DNS are within the library itself, others are skipped as if not installed.
- The loader would still look for libraries on the host, which are for another C library: in the system's directories,
  and those in ``/etc/ld.so.preload``; the C library for character sets other than UTF-8 and ASCII. No option turns that
  off, so our copies have names that nobody has.

Prints the files that were copied, for ``contents.py``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

INSIDE = "_internal"
PROGRAM = "bootloader"
"""PyInstaller's program, in ``INSIDE``; ``ext/start`` knows both names."""
LIBGCC = "libgcc_s.so.1"
LIBC = "libc.so.6"
OF_THE_LOADER = (rb"(?:(?:/usr)?/lib[a-z0-9_/-]*/\0){2,}", rb"(?<=\0)/etc/ld\.so\.preload\0")
OF_THE_LIBRARY = (rb"(?<=\0)/usr/lib[a-z0-9_/-]*/gconv\0", rb"(?<=\0)/usr/lib[a-z0-9_/-]*/gconv/gconv-modules\.cache\0")


def dynamic_objects(bundle: Path) -> dict[Path, list[str]]:
    """Each object below ``bundle`` that the loader is to map → the libraries that it names. Not the guest kernel and
    not static programs."""
    found = {}
    for path in sorted(bundle.rglob("*")):
        if path.is_file() and not path.is_symlink() and "assets" not in path.parts:
            with path.open("rb") as file:
                is_elf = file.read(4) == b"\x7fELF"
            if is_elf and (names := needed(path)):
                found[path] = names
    return found


def needed(path: Path) -> list[str]:
    """The libraries that an object names."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("-d", path))


def loader_of(program: Path) -> Path:
    """The loader that an executable names."""
    found = re.search(r"program interpreter: (.+)\]", _readelf("-l", program))
    if found is None:
        raise SystemExit(f"bring_c_library: {program} names no loader")
    return Path(found[1])


def closed(content: bytes, names: Iterable[bytes]) -> bytes:
    """A library in which each of these names, as patterns, is one that no host has. Raises SystemExit if it has no such
    name."""
    for name in names:
        content, count = re.subn(name, lambda match: re.sub(rb"[^/\0]", b"\1", match[0]), content)
        if not count:
            raise SystemExit(f"bring_c_library: no name of the form {name!r}")
    return content


def bring(bundle: Path) -> list[Path]:
    """Copy what is missing; the files that were copied."""
    folder = bundle / INSIDE
    loader = loader_of(folder / PROGRAM)
    system = loader.resolve().parent
    objects = dynamic_objects(bundle)
    present = {path.name for path in (*objects, *folder.iterdir())}
    wanted = [LIBGCC, *(name for names in objects.values() for name in names)]
    copied = []
    while wanted:
        name = wanted.pop()
        if name in present:
            continue
        source = system / name
        if not source.exists():
            raise SystemExit(f"bring_c_library: {name} is neither in the bundle nor in {system}")
        target = folder / name
        shutil.copyfile(source, target)
        target.chmod(0o755)
        present.add(name)
        wanted += needed(target)
        copied.append(source)
    (folder / LIBC).write_bytes(closed((system / LIBC).read_bytes(), OF_THE_LIBRARY))
    (folder / loader.name).write_bytes(closed(loader.read_bytes(), OF_THE_LOADER))
    (folder / loader.name).chmod(0o755)
    return sorted({*copied, system / loader.name})


def _readelf(what: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", what, str(path)], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(*bring(Path(sys.argv[1])), sep="\n")
