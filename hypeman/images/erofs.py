"""Writes an EROFS file system in one pass from an in-memory file tree.

Why not mkfs.erofs: Debian 12's version reads only directories, so every layer would have to be
unpacked as root on the host first, and it compresses on one core in clusters of 4 KiB. Here data is
written while a layer is being read, nothing is unpacked, and no tool is needed on the host.

    block 0     super block at 1024, with checksum
    1 …         file data in order of arrival; the space of files replaced by a later layer is
                released to the host as holes
    then        directory blocks
    meta        inodes, 64 bytes each and aligned to 32, followed by xattrs and, where they fit, by
                small files, link targets and the ends of directories; or by the index of a large file

Choices, with numbers from ``tests/bench/bench_images.py``:

- LZ4 in extents of 64 KiB (16 logical clusters): 0.44 of the size of /usr/bin, against 0.49 for
  32 KiB and 0.42 for 128 KiB, which would make small reads slower in the guest. Linux ≥ 5.13.
- Files up to about 4 KiB are stored inline with their inode: no separate block and no second read.
- Sparse files are stored as chunks, uncompressed, with holes that cost 4 bytes each 64 KiB.
- Output is deterministic: the same layers give the same bytes.

On-disk format: Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux. Numbers are
little-endian. An inode's number (nid) is its offset in the meta area in units of 32 bytes.
"""

from __future__ import annotations

import stat
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from struct import Struct as Layout
from typing import Protocol

import lz4.block

from hypeman.images.layers import Sink, Tree
from hypeman.images.nodes import Directory, Node
from hypeman.images.tar import Entry, TarError

BLOCK = 4096
EXTENT = 64 << 10
"""Bytes of a file that are compressed together."""
_LAST_EXTENT = EXTENT + BLOCK
"""Maximum of a file's last extent, so that a short tail does not get its own extent."""
_CHUNK_BITS = 16
_HOLE = 0xFFFFFFFF
_MAX_CHUNKS = 16 << 20
"""Of all sparse files together: 1 TiB of holes, and 64 MiB of memory for them."""
_SUPER_OFFSET = 1024
_MAGIC = 0xE0F5E1E2
_COMPAT = 0x1 | 0x2  # checksum, mtime
_ZERO_PADDING, _BIG_CLUSTERS, _CHUNKED = 0x1, 0x2, 0x4
_PLAIN_DATA, _COMPRESSED_DATA, _INLINE_DATA, _CHUNK_DATA = 0, 1, 2, 4
_CLUSTER_PLAIN, _CLUSTER_HEAD, _CLUSTER_NEXT = 0, 1, 2
_CLUSTER_COUNT = 1 << 11

_SUPER = Layout("<IIIBBHQQIIII16s16sIHHHBB36x")
_INODE = Layout("<HHHHQIIIIqII16x")
_DIRENT = Layout("<QHBx")
_CLUSTER = Layout("<HHI")
_CLUSTER_DELTA = Layout("<HHHH")
_MAP_HEADER = Layout("<IHBB8x")
_XATTR_HEADER = bytes(12)
_XATTR_ENTRY = Layout("<BBH")
_XATTR_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_XATTR_WHOLE = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_FILE_TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7,
}  # fmt: skip


class Output(Protocol):
    """Output written at offsets: a file, or an in-memory fake."""

    def write_at(self, data: bytes | bytearray, offset: int) -> None: ...
    def read_at(self, length: int, offset: int) -> bytes: ...
    def punch(self, offset: int, length: int) -> None: ...


# A node's content is None (empty), bytes (link target), int (a small file: its offset in the scratch file
# until the inodes are written), or an array, whose type code determines the meaning of its numbers.
_EXTENTS = "Q"
"""A compressed file: for each extent its first block << 8 | blocks; blocks 0: uncompressed."""
_CHUNKS = "I"
"""A sparse file: first block of each chunk, or _HOLE."""
_WHOLE = "L"
"""A link target that does not fit inline: its own block."""


class _Shape:
    """How a directory is stored: its size, own blocks, inline bytes."""

    __slots__ = ("rest", "size", "whole")

    def __init__(self, directory: Directory) -> None:
        blocks = tail = 0
        for block in _directory_blocks(directory):
            blocks += 1
            tail = sum(_DIRENT.size + len(name) for name, _ in block)
        self.size = (blocks - 1) * BLOCK + tail
        beside = tail <= _room_beside(directory)
        self.whole = blocks - 1 if beside else blocks
        self.rest = tail if beside else 0


class _Job:
    """One extent being compressed in a thread."""

    __slots__ = ("extents", "packed", "raw")

    def __init__(self, extents: array[int], raw: bytes, packed: Future[bytes]) -> None:
        self.extents, self.raw, self.packed = extents, raw, packed


class Writer(Sink):
    """Stores file data while layers are applied; ``finish`` then writes the rest.

    ``scratch`` holds small files until then. ``threads`` compress; at most ``ahead`` extents are queued.
    """

    def __init__(self, output: Output, scratch: Output, threads: Executor, *, max_bytes: int, ahead: int = 32) -> None:
        self._output = output
        self._scratch = scratch
        self._threads = threads
        self._jobs: deque[_Job] = deque()
        self._ahead = ahead
        self._next_block = 1
        self._max_blocks = min(max_bytes // BLOCK, 0xFFFFFFFE)
        self._run = bytearray()
        """Blocks queued to be written together, the last ones before _next_block."""
        self._small = bytearray()
        self._small_at = 0
        self._chunks = 0

    # While layers are read

    def store(self, node: Node, entry: Entry, read: Callable[[int], bytes]) -> None:
        if entry.pieces is not None:
            node.content = self._store_sparse(entry, read)
        elif not entry.size:
            node.content = None
        elif entry.size <= _room_beside(node):
            node.content = self._small_at + len(self._small)
            self._small += read(entry.size)
            if len(self._small) >= 1 << 20:
                self._flush_small()
        else:
            node.content = self._store_extents(entry.size, read)

    def discard(self, node: Node) -> None:
        content = node.content
        if _is(content, _EXTENTS):
            if len(content) < _extent_count(node.size):
                self.settle()  # placed in order, or the disk would depend on timing
            for blocks in _extent_blocks(content, node.size):
                self._free(*blocks)
        elif _is(content, _CHUNKS):
            for number, chunk in enumerate(content):
                if chunk != _HOLE:
                    self._free(chunk, _chunk_blocks(number, node.size))

    def settle(self) -> None:
        """Place every extent still being compressed."""
        while self._jobs:
            self._place(self._jobs.popleft())

    def _store_extents(self, size: int, read: Callable[[int], bytes]) -> array[int]:
        extents = array(_EXTENTS)
        while size:
            length = size if size <= _LAST_EXTENT else EXTENT
            raw = read(length)
            size -= length
            self._jobs.append(_Job(extents, raw, self._threads.submit(_compress, raw)))
            while len(self._jobs) > self._ahead or (self._jobs and self._jobs[0].packed.done()):
                self._place(self._jobs.popleft())
        return extents

    def _place(self, job: _Job) -> None:
        packed = job.packed.result()
        blocks = -(-len(packed) // BLOCK)
        if blocks < -(-len(job.raw) // BLOCK):
            # The kernel expects the data at the end of its blocks, preceded by zeros.
            job.extents.append(self._next_block << 8 | blocks)
            self._append(bytes(-len(packed) % BLOCK) + packed)
        else:
            job.extents.append(self._next_block << 8)
            self._append(job.raw + bytes(-len(job.raw) % BLOCK))

    def _store_sparse(self, entry: Entry, read: Callable[[int], bytes]) -> array[int]:
        self._chunks += entry.size >> _CHUNK_BITS
        if self._chunks > _MAX_CHUNKS:
            raise TarError(f"has a sparse file of {entry.size} bytes, more than an image may have")
        step = 1 << _CHUNK_BITS
        count = -(-entry.size // step)
        chunks = array(_CHUNKS)
        buffer = bytearray()
        """The chunk being assembled, number len(chunks); empty if it has no data yet."""

        def close_chunk() -> None:
            if buffer.count(0) == len(buffer):
                chunks.append(_HOLE)
            else:
                blocks = _chunk_blocks(len(chunks), entry.size)
                chunks.append(self._next_block)
                self._append(bytes(buffer).ljust(blocks * BLOCK, b"\0"))
            buffer.clear()

        self.settle()
        for offset, length in entry.pieces or ():
            while length:
                if offset >> _CHUNK_BITS > len(chunks):
                    if buffer:
                        close_chunk()
                    chunks.extend(array(_CHUNKS, [_HOLE]) * ((offset >> _CHUNK_BITS) - len(chunks)))
                inside = offset - (len(chunks) << _CHUNK_BITS)
                take = min(length, step - inside)
                buffer += bytes(inside - len(buffer))
                buffer += read(take)
                offset, length = offset + take, length - take
                if len(buffer) == step:
                    close_chunk()
        if buffer:
            close_chunk()
        chunks.extend(array(_CHUNKS, [_HOLE]) * (count - len(chunks)))
        return chunks

    def _append(self, blocks: bytes) -> None:
        self._next_block += len(blocks) // BLOCK
        if self._next_block > self._max_blocks:
            raise TarError(f"fills more than the {self._max_blocks * BLOCK} bytes that an image may have")
        self._run += blocks
        if len(self._run) >= 1 << 20:
            self._flush_run()

    def _flush_run(self) -> None:
        if self._run:
            self._output.write_at(self._run, self._next_block * BLOCK - len(self._run))
            self._run = bytearray()

    def _flush_small(self) -> None:
        self._scratch.write_at(self._small, self._small_at)
        self._small_at += len(self._small)
        self._small = bytearray()

    def _free(self, block: int, count: int) -> None:
        self._flush_run()
        self._output.punch(block * BLOCK, count * BLOCK)

    # After all layers are applied

    def finish(self, tree: Tree, *, uuid: bytes, on_entry: Callable[[], None] = lambda: None) -> tuple[int, int]:
        """Write directories, inodes and super block. ``on_entry`` is called for every inode.

        Returns the size of the file system and the uncompressed size of its files, in bytes.
        """
        self.settle()
        for _, _, node in tree.walk():
            if isinstance(node, Directory):
                node.content = _Shape(node)
            elif isinstance(node.content, bytes) and node.size > _room_beside(node):
                target, node.content = node.content, array(_WHOLE, [self._next_block])
                self._append(target.ljust(BLOCK, b"\0"))
        tree.root.content = _Shape(tree.root)
        self._flush_run()
        self._flush_small()
        plan = _Plan(tree)
        directories_at = self._next_block
        meta_at = directories_at + plan.directory_blocks
        blocks = meta_at + -(-plan.meta_size // BLOCK)
        if blocks > self._max_blocks:
            raise TarError(f"fills more than the {self._max_blocks * BLOCK} bytes that an image may have")
        out = _Sequential(self._output, directories_at * BLOCK)
        for directory in plan.directories():
            if directory.content.whole:
                out.write(_directory_data(directory)[: directory.content.whole * BLOCK])
        assert out.at == meta_at * BLOCK
        block = directories_at
        for node in plan.inodes():
            on_entry()
            out.fill(meta_at * BLOCK + node.place * 32)
            out.write(self._inode(node, block))
            if isinstance(node, Directory):
                block += node.content.whole
        out.fill(blocks * BLOCK)
        out.flush()
        self._output.write_at(_super_block(plan, blocks, meta_at, uuid), 0)
        return blocks * BLOCK, plan.content_bytes

    def _inode(self, node: Node, directory_block: int) -> bytes:
        """The inode with everything that follows it; ``directory_block`` is a directory's first block."""
        layout, address, tail, size, links = _PLAIN_DATA, 0, b"", node.size, node.links
        xattrs = _xattr_bytes(node)
        kind = stat.S_IFMT(node.mode)
        if isinstance(node, Directory):
            shape = node.content
            size, links, address = shape.size, _directory_links(node), directory_block
            if shape.rest:
                layout, tail = _INLINE_DATA, _directory_data(node)[shape.whole * BLOCK :]
        elif _is(node.content, _WHOLE):
            address = node.content[0]
        elif isinstance(node.content, bytes):
            layout, tail = _INLINE_DATA, node.content
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = node.device
            address = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
        elif isinstance(node.content, int):
            layout, tail = _INLINE_DATA, self._scratch.read_at(node.size, node.content)
        elif _is(node.content, _EXTENTS):
            layout = _COMPRESSED_DATA
            address = sum(count for _, count in _extent_blocks(node.content, node.size))
            tail = bytes(-len(xattrs) % 8) + _index(node.content, node.size)
        elif _is(node.content, _CHUNKS):
            layout, address = _CHUNK_DATA, _CHUNK_BITS - 12
            tail = struct.pack(f"<{len(node.content)}I", *node.content)
        count = (len(xattrs) - 12) // 4 + 1 if xattrs else 0
        head = _INODE.pack(
            1 | layout << 1, count, node.mode, 0, size, address, node.place, node.uid, node.gid,
            node.mtime, node.mtime_ns, links,
        )  # fmt: skip
        return head + xattrs + tail


class _Plan:
    """Placement of all inodes. The root comes first, since the super block has 16 bits for its number."""

    _ROOT_PLACE = 32
    """Not 0: programs treat inode number 0 as a deleted file."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.root = tree.root
        self.directory_blocks = 0
        self.count = self.content_bytes = 0
        at = self._ROOT_PLACE * 32
        for node in self._nodes():
            self.content_bytes += -(-node.size // BLOCK) * BLOCK
            if node.place:
                continue  # another name of the same file
            head, tail, together = _extent_of_inode(node)
            if together and at % BLOCK + head + tail > BLOCK:
                at += -at % BLOCK  # inline data must not cross a block boundary
            node.place = at // 32
            at += head + tail
            at += -at % 32
            self.count += 1
            if isinstance(node, Directory):
                self.directory_blocks += node.content.whole
        self.meta_size = at

    def _nodes(self) -> Iterator[Node]:
        yield self.root
        for _, _, node in self._tree.walk():
            yield node

    def inodes(self) -> Iterator[Node]:
        """Every node once, in order of placement."""
        last = 0
        for node in self._nodes():
            if node.place > last:
                last = node.place
                yield node

    def directories(self) -> Iterator[Directory]:
        return (node for node in self._nodes() if isinstance(node, Directory))


class _Sequential:
    """Appends to an Output through a buffer."""

    def __init__(self, output: Output, at: int) -> None:
        self._output = output
        self._buffer = bytearray()
        self.at = at

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.at += len(data)
        if len(self._buffer) >= 1 << 20:
            self.flush()

    def fill(self, until: int) -> None:
        self.write(bytes(until - self.at))

    def flush(self) -> None:
        self._output.write_at(self._buffer, self.at - len(self._buffer))
        self._buffer = bytearray()


def _is(content: object, numbers: str) -> bool:
    return isinstance(content, array) and content.typecode == numbers


def _compress(raw: bytes) -> bytes:
    return bytes(lz4.block.compress(raw, store_size=False))


def _room_beside(node: Node) -> int:
    """Inline bytes that fit into one block with the node's inode and xattrs."""
    return BLOCK - _INODE.size - len(_xattr_bytes(node))


def _extent_of_inode(node: Node) -> tuple[int, int, bool]:
    """Bytes of inode and xattrs; bytes that follow; whether both must lie in one block."""
    head = _INODE.size + len(_xattr_bytes(node))
    if isinstance(node, Directory):
        return head, node.content.rest, True
    if isinstance(node.content, bytes | int):
        return head, node.size, True
    if _is(node.content, _EXTENTS):
        return head, -head % 8 + 16 + 8 * -(-node.size // BLOCK), False
    if _is(node.content, _CHUNKS):
        return head, 4 * len(node.content), False
    return head, 0, False


def _xattr_bytes(node: Node) -> bytes:
    if not node.xattrs:
        return b""
    out = bytearray(_XATTR_HEADER)
    for key in sorted(node.xattrs):
        value = node.xattrs[key]
        index, name = _XATTR_WHOLE.get(key, 0), b""
        for prefix, number in _XATTR_PREFIXES:
            if key.startswith(prefix) and len(key) > len(prefix):
                index, name = number, key[len(prefix) :]
        if not index:
            continue  # a namespace specific to the system that created it
        out += _XATTR_ENTRY.pack(len(name), index, len(value)) + name + value
        out += bytes(-len(out) % 4)
    return bytes(out) if len(out) > len(_XATTR_HEADER) else b""


def _extent_lengths(count: int, size: int) -> Iterator[int]:
    """Logical bytes of each of ``count`` extents of a file of ``size`` bytes."""
    for number in range(count):
        yield EXTENT if number < count - 1 else size - EXTENT * (count - 1)


def _extent_blocks(extents: array[int], size: int) -> Iterator[tuple[int, int]]:
    """(first block, blocks) of each extent."""
    for extent, length in zip(extents, _extent_lengths(len(extents), size), strict=True):
        yield extent >> 8, extent & 0xFF or -(-length // BLOCK)


def _extent_count(size: int) -> int:
    """How many extents ``Writer._store_extents`` makes of ``size`` bytes."""
    return 1 if size <= _LAST_EXTENT else 1 + -(-(size - _LAST_EXTENT) // EXTENT)


def _index(extents: array[int], size: int) -> bytes:
    """Map header and one entry for each logical cluster of 4 KiB."""
    out = bytearray(_MAP_HEADER.pack(0, 0x2, 0, 0))  # big clusters; LZ4; clusters of one block
    for extent, length in zip(extents, _extent_lengths(len(extents), size), strict=True):
        block, packed = extent >> 8, extent & 0xFF
        clusters = -(-length // BLOCK)
        if not packed:
            for number in range(clusters):
                out += _CLUSTER.pack(_CLUSTER_PLAIN, 0, block + number)
            continue
        out += _CLUSTER.pack(_CLUSTER_HEAD, 0, block)
        for number in range(1, clusters):
            back = _CLUSTER_COUNT | packed if number == 1 else number
            out += _CLUSTER_DELTA.pack(_CLUSTER_NEXT, 0, back, clusters - number)
    return bytes(out)


def _chunk_blocks(number: int, size: int) -> int:
    """Blocks of a chunk, up to the end of the file."""
    length = min(1 << _CHUNK_BITS, size - (number << _CHUNK_BITS))
    return -(-length // BLOCK)


def _directory_blocks(directory: Directory) -> Iterator[list[tuple[bytes, Node]]]:
    """Names in byte order, one list per block."""
    children = directory.children
    dots: dict[bytes, Node] = {b".": directory, b"..": directory.parent}
    block: list[tuple[bytes, Node]] = []
    used = 0
    for name in sorted([*children, *dots]):
        need = _DIRENT.size + len(name)
        if used + need > BLOCK:
            yield block
            block, used = [], 0
        block.append((name, dots.get(name) or children[name]))
        used += need
    yield block


def _directory_links(directory: Directory) -> int:
    return 2 + sum(isinstance(child, Directory) for child in directory.children.values())


def _directory_data(directory: Directory) -> bytes:
    """All blocks, the last one padded only if it is not stored inline."""
    parts = []
    for block in _directory_blocks(directory):
        at = _DIRENT.size * len(block)
        head = bytearray()
        for name, node in block:
            head += _DIRENT.pack(node.place, at, _FILE_TYPES[stat.S_IFMT(node.mode)])
            at += len(name)
        parts.append(bytes(head) + b"".join(name for name, _ in block))
    whole = directory.content.whole
    return b"".join(part.ljust(BLOCK, b"\0") if number < whole else part for number, part in enumerate(parts))


def _super_block(plan: _Plan, blocks: int, meta_at: int, uuid: bytes) -> bytes:
    """Block 0. The list of compression settings follows the super block itself."""
    lz4_settings = Layout("<HHH10x").pack(14, 0xFFFF, -(-_LAST_EXTENT // BLOCK))
    incompat = _ZERO_PADDING | _BIG_CLUSTERS | _CHUNKED

    def packed(checksum: int) -> bytes:
        head = _SUPER.pack(
            _MAGIC, checksum, _COMPAT, 12, 0, plan.root.place, plan.count, 0, 0, blocks, meta_at, 0, uuid, b"",
            incompat, 1, 0, 0, 0, 0,
        )  # fmt: skip
        return (bytes(_SUPER_OFFSET) + head + lz4_settings).ljust(BLOCK, b"\0")

    return packed(crc32c(packed(0)[_SUPER_OFFSET:]))


def check_super_block(head: bytes, size: int) -> None:
    """Check the first block of a file system of ``size`` bytes, read back. Raises ValueError."""
    fields = _SUPER.unpack_from(head, _SUPER_OFFSET)
    magic, checksum, blocks = fields[0], fields[1], fields[9]
    cleared = head[_SUPER_OFFSET : _SUPER_OFFSET + 4] + bytes(4) + head[_SUPER_OFFSET + 8 : BLOCK]
    if magic != _MAGIC or crc32c(cleared) != checksum or blocks * BLOCK != size:
        raise ValueError("the disk's super block is damaged")


def crc32c(data: bytes) -> int:
    """CRC-32C as in EROFS: initialised with all ones, not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc
