"""The nodes of a file tree in memory, stored compactly enough for a million files. Pure.

As Python objects a file and its name take 330 bytes, packed about 25. So files are objects only while in use:
when there are too many, all are packed, one string per directory, and unpacked on the next access. Directories
and files with several names stay objects, because others refer to them.

A file's Node must not be used after ``Shelf.pack`` is called.
"""

from __future__ import annotations

import stat
from array import array
from typing import Any

import lz4.block
import msgspec

ENOUGH = 20_000
"""Maximum of unpacked files: 7 MB."""


class Node(msgspec.Struct, array_like=True, eq=False, gc=False):
    """A file of any kind. Hard links are one Node under several names."""

    mode: int
    """``st_mode``: file type and permissions."""
    layer: int
    """The layer that this node, with its present metadata, came from."""
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_ns: int = 0
    size: int = 0
    links: int = 0
    """Number of names in the tree; not for directories."""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] | None = None
    content: Any = None
    """Target of a symbolic link, or the sink's representation of file data: bytes, a number or an array of numbers."""
    place: int = 0
    """Inode location, set by the disk writer."""


class Directory(Node, array_like=True, eq=False, gc=True):
    parent: Any = None
    """A Directory; the root is its own parent."""
    shelf: Any = None
    loose: dict[bytes, Node] = {}
    """The unpacked children."""
    packed: bytes | None = None

    @property
    def children(self) -> dict[bytes, Node]:
        """Names and nodes, mutable, valid until the next ``Shelf.pack``."""
        if self.packed is not None:
            self.shelf.unpack(self)
        return self.loose


class Shelf:
    """Packs and unpacks the files of a tree; the packed data is stored in each directory."""

    def __init__(self, *, enough: int = ENOUGH) -> None:
        self._enough = enough
        self._open: list[Directory] = []
        """Directories with unpacked files; some may have left the tree meanwhile."""
        self.made = 0
        """Files created or accessed since the last packing: the budget for the next one."""
        self.unpacked = 0
        """Files unpacked since then."""

    def directory(self, mode: int, layer: int, parent: Directory | None) -> Directory:
        """A new, empty directory."""
        made = Directory(stat.S_IFDIR | mode, layer, shelf=self)
        made.parent = parent or made
        self._open.append(made)
        return made

    @property
    def full(self) -> bool:
        return self.made + self.unpacked > self._enough

    def pack(self, *, besides: Directory | None = None) -> None:
        """Pack everything except the files of the directory ``besides``."""
        kept = []
        for directory in self._open:
            if directory is besides:
                kept.append(directory)
                continue
            files = {name: node for name, node in directory.loose.items() if node.links == 1}  # no directory has any
            directory.loose = {name: node for name, node in directory.loose.items() if node.links != 1}
            directory.packed = lz4.block.compress(_encode(files))
        self._open = kept
        self.made, self.unpacked = 0, sum(len(directory.loose) for directory in kept)

    def unpack(self, directory: Directory) -> None:
        assert directory.packed is not None
        files = _decode(lz4.block.decompress(directory.packed))
        directory.packed = None
        directory.loose.update(files)
        self.unpacked += len(files)
        self._open.append(directory)


def _pack_numbers(numbers: object) -> msgspec.msgpack.Ext:
    assert isinstance(numbers, array)
    return msgspec.msgpack.Ext(ord(numbers.typecode), numbers.tobytes())


def _unpack_numbers(code: int, data: memoryview) -> array[int]:
    return array(chr(code), bytes(data))


_encode = msgspec.msgpack.Encoder(enc_hook=_pack_numbers).encode
_decode = msgspec.msgpack.Decoder(dict[bytes, Node], ext_hook=_unpack_numbers).decode
