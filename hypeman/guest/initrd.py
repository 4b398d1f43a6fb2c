"""The initial RAM disk: our init, and the modules that a distribution's kernel needs to see a disk.

``build_initrd`` and ``plan_modules`` are pure: the same output for the same input. A kernel with built-in drivers
needs no modules. Uncompressed on purpose: unpacking costs more than reading 2 MB.

    python -m hypeman.guest.initrd [--modules /lib/modules/RELEASE] [--init INIT] OUT
"""

from __future__ import annotations

import argparse
import lzma
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import zstandard

GUEST_MODULES = (
    "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "ext4", "erofs", "overlay",
    "vmw_vsock_virtio_transport", "virtio_balloon", "virtio_mem", "virtio-rng", "button",
)  # fmt: skip
"""Modules a guest may need; built-in or missing ones are skipped."""

_TRAILER = "TRAILER!!!"
_DIR, _FILE, _CHAR = 0o040000, 0o100000, 0o020000


INIT = Path(__file__).parent / "bin" / "hypeman-init"
"""The static binary built from ``ext/guest_agent``."""


def build_initrd(init: bytes, modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A cpio archive (newc) with ``/init``, ``/dev/console`` and the modules, loaded in the given order."""
    archive = _Archive()
    archive.add("dev", _DIR | 0o755)
    archive.add("dev/console", _CHAR | 0o600, device=(5, 1))
    archive.add("init", _FILE | 0o755, init)
    if modules:
        archive.add("modules", _DIR | 0o755)
        archive.add("modules/order", _FILE | 0o644, "".join(f"{name}\n" for name, _ in modules).encode())
        for name, content in modules:
            archive.add(f"modules/{name}", _FILE | 0o644, content)
    return archive.finish()


class _Archive:
    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        links = 2 if mode & _DIR == _DIR else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts.append(_pad(header + name.encode() + b"\0"))
        self._parts.append(_pad(content))

    def finish(self) -> bytes:
        self._inode = -1
        self.add(_TRAILER, 0)
        archive = b"".join(self._parts)
        return archive + bytes(-len(archive) % 512)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def plan_modules(dependencies: str, wanted: Iterable[str] = GUEST_MODULES) -> list[str]:
    """Paths of the wanted modules and their dependencies, in load order.

    ``dependencies`` is the text of ``modules.dep``, as depmod writes it, or lines of that form: path, colon, the
    paths it needs. '-' and '_' are equivalent in names.
    """
    needs: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in dependencies.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        paths[_module_name(path)] = path
    order: list[str] = []

    def visit(path: str) -> None:
        if path in order:
            return
        for dependency in needs.get(path, []):
            visit(dependency)
        order.append(path)

    for name in wanted:
        if (module := paths.get(name.replace("-", "_"))) is not None:
            visit(module)
    return order


def _module_name(path: str) -> str:
    return PurePosixPath(path).name.split(".")[0].replace("-", "_")


def read_modules(tree: Path, wanted: Iterable[str] = GUEST_MODULES) -> list[tuple[str, bytes]]:
    """Names and contents of the modules that guests need from ``/lib/modules/<release>``, in load order.

    Requires ``modules.dep`` there (``depmod -b``), else raises FileNotFoundError.
    """
    order = plan_modules((tree / "modules.dep").read_text(), wanted)
    return [_read_module(tree / path) for path in order]


def _read_module(path: Path) -> tuple[str, bytes]:
    content = path.read_bytes()
    if path.suffix == ".xz":
        return path.stem, lzma.decompress(content)
    if path.suffix == ".zst":
        return path.stem, zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return path.name, content


def main(arguments: Sequence[str]) -> int:
    """Write an initrd with this package's init, or another architecture's."""
    parser = argparse.ArgumentParser(prog="python -m hypeman.guest.initrd", description=main.__doc__)
    parser.add_argument("--modules", type=Path, help="directory with modules.dep")
    parser.add_argument("--init", type=Path, default=INIT, help="the agent, if not this machine's")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    modules = read_modules(options.modules) if options.modules else []
    new = options.out.with_name(options.out.name + ".new")
    new.write_bytes(build_initrd(options.init.read_bytes(), modules))
    new.replace(options.out)  # VMs may have the old one mapped
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
