"""Fills an empty ext4 file system from an in-memory file tree, using the library of e2fsprogs.

Why not ``mke2fs -d``: it copies from a directory of the host, so an archive would have to be unpacked there
first. Here data is written while the archive is read, and names exist only inside the file system being
filled. ``libext2fs`` keeps bitmaps, extents and checksums right; it runs in the worker, as an
ordinary user, on a descriptor that the server opened.

The file system is newly created: inodes are allocated in sequence, and every directory is written once,
as a whole, so that filling takes linear time (``ext2fs_link`` searches the directory for every name).

On-disk format: Documentation/filesystems/ext4 of Linux. Numbers are little-endian.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import stat
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_long, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from struct import Struct as Layout
from struct import pack_into, unpack_from

from hypeman.images.layers import Sink, Tree
from hypeman.images.nodes import Directory, Node
from hypeman.images.tar import Entry, TarError, TooLarge

_PIECE = 1 << 20
"""Bytes per write."""
_MAX_FILE = (1 << 44) - 4096
_MAX_LINKS = 65_000
_ROOT = 2
_LOST_FOUND = b"lost+found"

_INODE_BYTES = 256
_FAST_LINK = 60
"""Shorter link targets are stored in the inode."""
_EXTENTS_FLAG = 0x80000
_NO_EXTENTS = Layout("<HHHHI").pack(0xF30A, 0, 4, 0, 0)
_EPOCHS = 1 << 34
"""Range in seconds of a time with its extra bits, from 2^31 before 1970."""

_DIRENT = Layout("<IHBB")
_TAIL = Layout("<IHBBI")
_FILE_TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7,
}  # fmt: skip

# From ext2fs.h and ext2_err.et
_OPEN_READ_WRITE, _OPEN_64_BITS = 0x1, 0x20000
_FILE_WRITE = 0x1
_BMAP_ALLOCATE = 0x1
_TO_THE_END = (1 << 64) - 1
_CHECKSUMS = 0x400
_NO_BLOCK, _NO_INODE, _NO_ROOM_FOR_XATTR = 2133571400, 2133571401, 2133571491

_SIGNATURES: dict[str, tuple[object, ...]] = {
    "ext2fs_open": (c_char_p, c_int, c_int, c_uint, c_void_p, c_void_p),
    "ext2fs_read_bitmaps": (c_void_p,),
    "ext2fs_close_free": (c_void_p,),
    "ext2fs_lookup": (c_void_p, c_uint32, c_char_p, c_int, c_char_p, c_void_p),
    "ext2fs_inode_alloc_stats2": (c_void_p, c_uint32, c_int, c_int),
    "ext2fs_read_inode_full": (c_void_p, c_uint32, c_char_p, c_int),
    "ext2fs_write_inode_full": (c_void_p, c_uint32, c_char_p, c_int),
    "ext2fs_file_open2": (c_void_p, c_uint32, c_void_p, c_int, c_void_p),
    "ext2fs_file_llseek": (c_void_p, c_uint64, c_int, c_void_p),
    "ext2fs_file_write": (c_void_p, c_char_p, c_uint, c_void_p),
    "ext2fs_file_set_size2": (c_void_p, c_uint64),
    "ext2fs_file_close": (c_void_p,),
    "ext2fs_bmap2": (c_void_p, c_uint32, c_void_p, c_char_p, c_int, c_uint64, c_void_p, c_void_p),
    "ext2fs_write_dir_block4": (c_void_p, c_uint64, c_char_p, c_int, c_uint32),
    "ext2fs_punch": (c_void_p, c_uint32, c_void_p, c_char_p, c_uint64, c_uint64),
    "ext2fs_xattrs_open": (c_void_p, c_uint32, c_void_p),
    "ext2fs_xattr_set": (c_void_p, c_char_p, c_char_p, c_size_t),
    "ext2fs_xattrs_close": (c_void_p,),
}


class Filler(Sink):
    """Stores file data while an archive is read; ``finish`` then writes the rest.

    ``fd`` is a newly created file system, open for reading and writing. All methods raise TarError for what
    ext4 cannot store (TooLarge if out of space or inodes) and OSError if the disk fails.
    """

    def __init__(self, fd: int) -> None:
        self._library = ctypes.CDLL("libext2fs.so.2")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_long
        manager = c_void_p.in_dll(self._library, "unixfd_io_manager")
        self._fs = c_void_p()
        flags = _OPEN_READ_WRITE | _OPEN_64_BITS
        own = os.dup(fd)  # the library closes it
        self._call("open", str(own).encode(), flags, 0, 0, manager, byref(self._fs), fs=False)
        self._call("read_bitmaps")
        head = os.pread(fd, 1024, 1024)
        (self._inodes,) = unpack_from("<I", head, 0)
        free_blocks, free_inodes = unpack_from("<II", head, 12)
        (free_blocks_high,) = unpack_from("<I", head, 0x158)
        self._next_inode = self._inodes - free_inodes + 1
        self._unused: list[int] = []
        """Inodes of files that were replaced."""
        self._block = 1024 << unpack_from("<I", head, 24)[0]
        self._space = (free_blocks | free_blocks_high << 32) * self._block
        """Estimate of the bytes left for files; the library keeps the exact count."""
        self._has_checksums = bool(unpack_from("<I", head, 100)[0] & _CHECKSUMS)

    # While the archive is read

    def store(self, node: Node, entry: Entry, read: Callable[[int], bytes]) -> None:
        if not entry.size:
            return
        if entry.stored > self._space:
            raise TooLarge(f"has more content than the file system has space for (entry {entry.name[:200]!r})")
        if entry.size > _MAX_FILE:
            raise TarError(f"has a file of {entry.size} bytes; ext4 allows {_MAX_FILE}")
        self._space -= entry.stored
        node.content = self._allocate(is_directory=False)
        self._write_inode(node.content, _raw_inode(stat.S_IFREG, links=1))
        pieces = ((0, entry.size),) if entry.pieces is None else entry.pieces
        self._write_data(node.content, entry.size, pieces, read)

    def discard(self, node: Node) -> None:
        if isinstance(node.content, int):
            self._call("punch", node.content, None, None, 0, _TO_THE_END)
            self._library.ext2fs_inode_alloc_stats2(self._fs, node.content, -1, 0)
            self._write_inode(node.content, bytearray(_INODE_BYTES))
            self._unused.append(node.content)

    # After it has been read

    def finish(self, tree: Tree, *, on_entry: Callable[[], None] = lambda: None) -> None:
        """Write inodes and directories, and close the file system. ``on_entry`` is called for every name."""
        tree.root.place = _ROOT
        content = _DirectoryContent(self._block, self._has_checksums, _ROOT, _ROOT)
        if _LOST_FOUND not in tree.root.children and (lost_found := self._look_up(_LOST_FOUND)):
            content.add(_LOST_FOUND, lost_found, stat.S_IFDIR)
        here = tree.root
        unwritten = {tree.root}
        # The children of a directory are consecutive and come after their parent.
        for directory, name, node in tree.walk():
            on_entry()
            if directory is not here:
                self._write_directory(here, content)
                unwritten.discard(here)
                here = directory
                content = _DirectoryContent(self._block, self._has_checksums, here.place, here.parent.place)
            if isinstance(node, Directory):
                node.place = self._allocate(is_directory=True)
                unwritten.add(node)
            elif not node.place:
                node.place = node.content if isinstance(node.content, int) else self._allocate(is_directory=False)
                self._write_node(node)
            content.add(name, node.place, node.mode)
        self._write_directory(here, content)
        unwritten.discard(here)
        for empty in unwritten:
            place = empty.place
            content = _DirectoryContent(self._block, self._has_checksums, place, empty.parent.place)
            self._write_directory(empty, content)
        self._call("close_free", byref(self._fs), fs=False)

    def _write_node(self, node: Node) -> None:
        if node.links > _MAX_LINKS:
            raise TarError(f"has a file with {node.links} names; ext4 allows {_MAX_LINKS}")
        kind = stat.S_IFMT(node.mode)
        raw = self._read_inode(node.content) if isinstance(node.content, int) else _raw_inode(kind)
        if kind == stat.S_IFLNK and len(node.content) < _FAST_LINK:
            pack_into("<II60s", raw, 32, 0, 0, node.content)
            pack_into("<I", raw, 4, len(node.content))
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = node.device
            old = (major << 8 | minor) if major < 256 and minor < 256 else 0
            new = 0 if old else (minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)
            pack_into("<IIII52x", raw, 32, 0, 0, old, new)
        elif kind == stat.S_IFIFO:
            pack_into("<II60x", raw, 32, 0, 0)
        _describe(raw, node, node.links)
        self._write_inode(node.place, raw)
        if kind == stat.S_IFLNK and len(node.content) >= _FAST_LINK:
            size = len(node.content)
            self._write_data(node.place, size, ((0, size),), io.BytesIO(node.content).read)
        self._write_xattrs(node)

    def _write_directory(self, directory: Directory, content: _DirectoryContent) -> None:
        blocks = content.blocks()
        raw = self._read_inode(_ROOT) if directory.place == _ROOT else _raw_inode(stat.S_IFDIR)
        links = 2 + content.subdirectories
        _describe(raw, directory, links if links < _MAX_LINKS else 1)
        size = len(blocks) * self._block
        pack_into("<I", raw, 4, size & 0xFFFFFFFF)
        pack_into("<I", raw, 108, size >> 32)
        self._write_inode(directory.place, raw)
        where = c_uint64()
        for number, block in enumerate(blocks):
            self._call("bmap2", directory.place, None, None, _BMAP_ALLOCATE, number, None, byref(where))
            self._call("write_dir_block4", where, bytes(block), 0, directory.place)
        self._write_xattrs(directory)

    def _write_data(
        self, inode: int, size: int, pieces: tuple[tuple[int, int], ...], read: Callable[[int], bytes]
    ) -> None:
        file, written = c_void_p(), c_uint()
        self._call("file_open2", inode, None, _FILE_WRITE, byref(file))
        for offset, length in pieces:
            self._call("file_llseek", file, offset, os.SEEK_SET, None, fs=False)
            while length:
                data = read(min(length, _PIECE))
                self._call("file_write", file, data, len(data), byref(written), fs=False)
                length -= len(data)
        self._call("file_set_size2", file, size, fs=False)
        self._call("file_close", file, fs=False)

    def _write_xattrs(self, node: Node) -> None:
        kept = {key: value for key, value in (node.xattrs or {}).items() if _is_kept(key, value)}
        if not kept:
            return
        handle = c_void_p()
        self._call("xattrs_open", node.place, byref(handle))
        for key in sorted(kept):
            self._call("xattr_set", handle, key, kept[key], len(kept[key]), fs=False)
        self._call("xattrs_close", byref(handle), fs=False)

    def _allocate(self, *, is_directory: bool) -> int:
        if self._unused:
            inode = self._unused.pop()
        elif self._next_inode > self._inodes:
            raise TooLarge(f"has more files than the {self._inodes} for which the file system has inodes")
        else:
            inode = self._next_inode
            self._next_inode += 1
        self._library.ext2fs_inode_alloc_stats2(self._fs, inode, 1, int(is_directory))
        return inode

    def _look_up(self, name: bytes) -> int:
        """Inode of a name in the root; 0 if there is none."""
        found = c_uint32()
        failed = self._library.ext2fs_lookup(self._fs, _ROOT, name, len(name), None, byref(found))
        return 0 if failed else found.value

    def _read_inode(self, inode: int) -> bytearray:
        buffer = ctypes.create_string_buffer(_INODE_BYTES)
        self._call("read_inode_full", inode, buffer, _INODE_BYTES)
        return bytearray(buffer.raw)

    def _write_inode(self, inode: int, raw: bytearray) -> None:
        self._call("write_inode_full", inode, bytes(raw), _INODE_BYTES)

    def _call(self, name: str, *arguments: object, fs: bool = True) -> None:
        """Call a library function that returns an error code; ``fs`` is its first argument."""
        function = getattr(self._library, f"ext2fs_{name}")
        error = function(self._fs, *arguments) if fs else function(*arguments)
        if error == 0:
            return
        if error == _NO_BLOCK:
            raise TooLarge("has more content than the file system has space for")
        if error == _NO_ROOM_FOR_XATTR:
            raise TarError("has a file with more extended attributes than ext4 can hold")
        known = error if error < 1 << 16 else errno.EIO
        raise OSError(known, f"{os.strerror(known)} (ext2fs_{name}: {error})")


class _DirectoryContent:
    """The blocks of one linear directory, with space for a checksum if the file system uses them."""

    def __init__(self, block: int, has_checksums: bool, inode: int, parent: int) -> None:
        self._room = block - (_TAIL.size if has_checksums else 0)
        self._tail = _TAIL.pack(0, _TAIL.size, 0, 0xDE, 0) if has_checksums else b""
        self._full: list[bytes] = []
        self._open = bytearray()
        self._last = 0
        """Offset of the last entry in the open block; its length extends to the end of the block."""
        self.subdirectories = -2
        self.add(b".", inode, stat.S_IFDIR)
        self.add(b"..", parent, stat.S_IFDIR)

    def add(self, name: bytes, inode: int, mode: int) -> None:
        length = _DIRENT.size + len(name)
        length += -length % 4
        if len(self._open) + length > self._room:
            self._close()
        self._last = len(self._open)
        kind = stat.S_IFMT(mode)
        self.subdirectories += kind == stat.S_IFDIR
        self._open += (_DIRENT.pack(inode, length, len(name), _FILE_TYPES[kind]) + name).ljust(length, b"\0")

    def blocks(self) -> list[bytes]:
        self._close()
        return self._full

    def _close(self) -> None:
        pack_into("<H", self._open, self._last + 4, self._room - self._last)
        self._full.append(bytes(self._open.ljust(self._room, b"\0")) + self._tail)
        self._open = bytearray()


def _raw_inode(kind: int, links: int = 0) -> bytearray:
    """An inode without data, with 32 bytes of extra fields as in the kernel."""
    raw = bytearray(_INODE_BYTES)
    pack_into("<H", raw, 0, kind)
    pack_into("<H", raw, 26, links)
    pack_into("<II", raw, 32, _EXTENTS_FLAG, 0)
    raw[40 : 40 + len(_NO_EXTENTS)] = _NO_EXTENTS
    pack_into("<H", raw, 128, 32)
    return raw


def _describe(raw: bytearray, node: Node, links: int) -> None:
    pack_into("<HH", raw, 0, node.mode, node.uid & 0xFFFF)
    pack_into("<HH", raw, 24, node.gid & 0xFFFF, links)
    pack_into("<HH", raw, 120, node.uid >> 16, node.gid >> 16)
    seconds = max(-(1 << 31), min(node.mtime, _EPOCHS - (1 << 31) - 1))
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low >> 31 else low
    extra = (seconds - signed) >> 32 | node.mtime_ns << 2
    pack_into("<III", raw, 8, low, low, low)
    pack_into("<III", raw, 132, extra, extra, extra)
    pack_into("<II", raw, 144, low, extra)


def _is_kept(key: bytes, value: bytes) -> bool:
    """Whether the attribute is meaningful on Linux; others are specific to the system that created the archive."""
    if key in (b"system.posix_acl_access", b"system.posix_acl_default"):
        return len(value) % 8 == 4 and value[:4] == b"\2\0\0\0"
    prefix, _, rest = key.partition(b".")
    return prefix in (b"user", b"trusted", b"security") and bool(rest)
