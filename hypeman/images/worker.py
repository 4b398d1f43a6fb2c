"""The process that reads archives: a separate program with minimal privileges.

Everything that reads an archive's bytes (decompression, tar, xattrs) happens here, as an ordinary
user, without network, unable to regain privileges, and with limits on memory and CPU time.
It opens no paths: the server passes open files over a socket. So a flaw in a decompressor does not
compromise the host, and the server's own requests do not wait for the interpreter lock.

    layers into a root disk     Begin (with the disk and a scratch file), Layer … (with the blob), Finish
    an archive into a volume    Fill (with the disk), Layer (with the archive), Finish
    files of an imported image  Sort (with the archive and a file for its plain form)

    worker → server   Progress …, Applied for each layer, then Done; Member and Link …, then Sorted;
                      Yield, which waits for Turn; or Failed, then exit

One JSON message per packet (``SOCK_SEQPACKET``). Layers are passed in order, as they arrive.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import posixpath
import queue
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import msgspec

from hypeman.host.descriptors import passed, room_for
from hypeman.host.own_program import own_command
from hypeman.images.erofs import Writer
from hypeman.images.ext4 import Filler
from hypeman.images.layers import Sink, Tree
from hypeman.images.manifest import Compression
from hypeman.images.tar import Kind, Source, TarError, TarReader, TooLarge
from hypeman.images.unpack import sniff, unpack

MAX_MESSAGE = 64 << 10
_NOBODY = 65534
_MEMORY_LIMIT = 3 << 30
_TIME_LIMIT = 3600
"""Seconds of CPU time; the largest image allowed by default needs a sixth of it."""
_CHUNKS_AHEAD = 8
_MAX_MEMBER_NAME = 512
"""Bytes. Files of an imported archive with longer names do not belong to an image."""
_PROGRESS_INTERVAL = 0.25
"""Seconds between reports."""
QUANTUM = 1.0
"""Seconds of work before yielding to another image."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Make an EROFS disk. Comes with two open files: the disk and a scratch file."""

    max_bytes: int
    """Of the disk, and of all layers unpacked."""
    max_entries: int
    uuid: str
    """Hex; of the file system."""


class Fill(msgspec.Struct, frozen=True, tag=True):
    """Fill an empty ext4 file system. Comes with the disk, open for reading and writing."""

    max_bytes: int
    """Of the archive unpacked, headers included."""
    max_entries: int


class Sort(msgspec.Struct, frozen=True, tag=True):
    """List the offsets of an archive's files. Comes with the archive and a file for its decompressed form, if any."""

    max_bytes: int
    max_entries: int


class Layer(msgspec.Struct, frozen=True, tag=True):
    """Comes with the archive, open for reading."""

    name: str
    """Its name in messages, such as ``layer sha256:…``."""
    diff_id: str
    """Digest of the uncompressed archive; empty if unknown."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    pass


class Turn(msgspec.Struct, frozen=True, tag=True):
    """The answer to ``Yield``: continue."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    bytes: int
    """Of unpacked layers so far."""


class Yield(msgspec.Struct, frozen=True, tag=True):
    """The worker has run for ``QUANTUM`` seconds and waits for its next turn, so that others can run."""


class Member(msgspec.Struct, frozen=True, tag=True):
    """A file of a sorted archive."""

    name: str
    offset: int
    """In the uncompressed archive."""
    size: int


class Link(msgspec.Struct, frozen=True, tag=True):
    """A symbolic or hard link of a sorted archive."""

    name: str
    target: str
    """Name of another member."""


class Sorted(msgspec.Struct, frozen=True, tag=True):
    plain: bool
    """The archive is not compressed: the members are in it, not in the second file."""


class Applied(msgspec.Struct, frozen=True, tag=True):
    name: str


class Done(msgspec.Struct, frozen=True, tag=True):
    size: int
    """Of the disk."""
    entries: int
    content_bytes: int
    """Size of the files in a file system without compression, in blocks of 4 KiB."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    message: str
    blame_image: bool
    """The image is at fault, not the host."""
    too_large: bool = False
    """It exceeds a limit or the available space."""


Request = Begin | Fill | Sort | Layer | Finish | Turn
Report = Progress | Yield | Member | Link | Sorted | Applied | Done | Failed

_encode = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(Request).decode


def main(fd: int) -> int:
    """Serve one conversion on the socket ``fd``; returns the process's exit code."""
    with socket.socket(fileno=fd) as link:
        try:
            confine()
            threading.Thread(target=_end_with, args=(link,), daemon=True).start()
            _work(link)
        except (TarError, ValueError) as error:
            return _fail(link, str(error), blame_image=True, too_large=isinstance(error, TooLarge))
        except TimeoutError as error:
            return _fail(link, str(error), blame_image=True)
        except MemoryError:
            return _fail(link, "the image has more files than fit into memory", blame_image=True)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            text = "the disk is full" if full else f"the disk cannot be written: {error.strerror}"
            return _fail(link, text, blame_image=False)
    return 0


def confine() -> None:
    """Drop all privileges permanently, except those that the host does not allow us to drop."""
    libc = ctypes.CDLL(None, use_errno=True)
    dumpable, no_new_privs = 4, 38
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (_TIME_LIMIT, _TIME_LIMIT + 60))
    signal.signal(signal.SIGXCPU, _out_of_time)
    if os.geteuid() == 0:
        new_network, new_ipc, new_mounts = 0x40000000, 0x08000000, 0x00020000
        libc.unshare(new_network | new_ipc | new_mounts)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc.prctl(no_new_privs, 1, 0, 0, 0)
    libc.prctl(dumpable, 0, 0, 0, 0)
    with contextlib.suppress(OSError):
        os.nice(5)


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"the image takes more than {_TIME_LIMIT} seconds of processor time to convert")


def _end_with(link: socket.socket) -> None:
    """Exit when the server does. Not by PR_SET_PDEATHSIG: that fires when the *thread* that started us
    exits, and the server's threads are short-lived."""
    poller = select.poll()
    poller.register(link, 0)  # hang-ups are always reported
    poller.poll()
    os._exit(1)


def _fail(link: socket.socket, message: str, *, blame_image: bool, too_large: bool = False) -> int:
    with contextlib.suppress(OSError):
        link.send(_encode(Failed(message[:2000], blame_image, too_large)))
    return 1


class _FileOutput:
    """An ``erofs.Output`` on an open file."""

    def __init__(self, fd: int, libc: ctypes.CDLL) -> None:
        self._fd = fd
        self._libc = libc

    def write_at(self, data: bytes | bytearray, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def read_at(self, length: int, offset: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def punch(self, offset: int, length: int) -> None:
        """Release the space; on a file system without holes it stays unused."""
        punch_hole = 0x01 | 0x02
        self._libc.fallocate(self._fd, punch_hole, ctypes.c_int64(offset), ctypes.c_int64(length))


def _work(link: socket.socket) -> None:
    first, files = _receive(link)
    report = _Reporter(link)
    if isinstance(first, Begin) and len(files) == 2:
        _convert(link, first, files[0], files[1], report)
    elif isinstance(first, Fill) and len(files) == 1:
        _fill(link, first, files[0], report)
    elif isinstance(first, Sort) and len(files) == 2:
        _sort(link, first, files[0], files[1], report)
    else:
        raise ValueError("the conversion was begun in the wrong order")


def _convert(link: socket.socket, begin: Begin, disk: int, scratch: int, report: _Reporter) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    threads = max(1, min(4, (os.cpu_count() or 1)))
    with ThreadPoolExecutor(threads) as pool:
        writer = Writer(_FileOutput(disk, libc), _FileOutput(scratch, libc), pool, max_bytes=begin.max_bytes)
        tree = Tree(max_entries=begin.max_entries)
        _apply_all(link, tree, writer, begin, report)
        size, content = writer.finish(tree, uuid=bytes.fromhex(begin.uuid), on_entry=report.take_turns)
    os.ftruncate(disk, size)
    os.fsync(disk)
    link.send(_encode(Done(size, tree.entries, content)))


def _fill(link: socket.socket, fill: Fill, disk: int, report: _Reporter) -> None:
    filler = Filler(disk)
    tree = Tree(max_entries=fill.max_entries, whiteouts=False)
    _apply_all(link, tree, filler, fill, report)
    filler.finish(tree, on_entry=report.take_turns)
    os.fsync(disk)
    link.send(_encode(Done(os.fstat(disk).st_size, tree.entries, 0)))


def _apply_all(link: socket.socket, tree: Tree, sink: Sink, bounds: Begin | Fill, report: _Reporter) -> None:
    """Apply the layers that the server sends, up to ``Finish``."""
    left = bounds.max_bytes
    while True:
        request, files = _receive(link)
        if isinstance(request, Finish):
            return
        assert isinstance(request, Layer)
        try:
            left -= _apply(request, files[0], tree, sink, left, bounds.max_entries, report)
        except TarError as error:
            kind = TooLarge if isinstance(error, TooLarge) else TarError
            raise kind(f"{request.name} {error}") from None
        finally:
            os.close(files[0])
        link.send(_encode(Applied(request.name)))


def _apply(layer: Layer, blob: int, tree: Tree, sink: Sink, limit: int, max_entries: int, report: _Reporter) -> int:
    """Apply one layer; returns its unpacked size."""
    digest = hashlib.sha256()

    def plain() -> Iterator[bytes]:
        for chunk in unpack(_reader(blob)):
            digest.update(chunk)
            yield chunk

    with _in_thread(plain()) as chunks:
        source = Source(report.counted(chunks), limit=limit)
        tree.apply(TarReader(source, max_entries=max_entries), sink)
        # Data after the end of the archive is ignored, but part of the digest.
        source.drain()
    if not source.total and not layer.diff_id:
        raise TarError("is empty")
    if layer.diff_id and "sha256:" + digest.hexdigest() != layer.diff_id:
        raise TarError(f"is not what the image's config says: it unpacks to sha256:{digest.hexdigest()}")
    return source.total


def _reader(fd: int) -> Callable[[int], bytes]:
    """Reads a file from its start, using pread because the server's descriptor shares the offset."""
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        data = os.pread(fd, size, at)
        at += len(data)
        return data

    return read


def _sort(link: socket.socket, sort: Sort, archive: int, plain: int, report: _Reporter) -> None:
    is_plain = sniff(os.pread(archive, 8, 0)) is Compression.NONE

    def chunks() -> Iterator[bytes]:
        for chunk in unpack(_reader(archive)):
            if not is_plain:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(plain, view) :]
            yield chunk

    source = Source(report.counted(chunks()), limit=sort.max_bytes)
    reader = TarReader(source, max_entries=sort.max_entries)
    while (entry := reader.next_entry()) is not None:
        if max(len(entry.name), len(entry.target)) > _MAX_MEMBER_NAME:
            continue
        name = _clean(entry.name)
        if entry.kind is Kind.FILE and entry.pieces is None:
            link.send(_encode(Member(name, source.position, entry.size)))
        elif entry.kind is Kind.SYMLINK:
            link.send(_encode(Link(name, _clean(posixpath.join(posixpath.dirname(entry.name), entry.target)))))
        elif entry.kind is Kind.HARD_LINK:
            link.send(_encode(Link(name, _clean(entry.target))))
    link.send(_encode(Sorted(is_plain)))


def _clean(name: bytes) -> str:
    """A path as a key: no leading or doubled slashes, no dots. Its target does not matter here."""
    return posixpath.normpath(name).decode(errors="backslashreplace").lstrip("/")


class _Reporter:
    """Counts unpacked bytes, reports them periodically and yields to other workers."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._bytes = 0
        self._next = time.monotonic() + _PROGRESS_INTERVAL
        self._turn_ends = time.monotonic() + QUANTUM

    def counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._bytes += len(chunk)
            if time.monotonic() >= self._next:
                self._link.send(_encode(Progress(self._bytes)))
                self._next = time.monotonic() + _PROGRESS_INTERVAL
            self.take_turns()
            yield chunk

    def take_turns(self) -> None:
        """Wait for the next turn if this one has expired."""
        if time.monotonic() < self._turn_ends:
            return
        self._link.send(_encode(Yield()))
        answer, _ = _receive(self._link)
        if not isinstance(answer, Turn):
            raise ValueError("a turn was to be given")
        self._turn_ends = time.monotonic() + QUANTUM


@contextlib.contextmanager
def _in_thread(chunks: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """Run ``chunks`` in a thread, a few ahead: decompression in parallel with parsing and compression."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(_CHUNKS_AHEAD)
    stop = threading.Event()

    def put(item: bytes | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def pump() -> None:
        try:
            for chunk in chunks:
                put(chunk)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    def pull() -> Iterator[bytes]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield pull()
    finally:
        stop.set()
        thread.join()


def _receive(link: socket.socket) -> tuple[Request, list[int]]:
    """The next message and the files that came with it."""
    data, ancillary, _, _ = link.recvmsg(MAX_MESSAGE, room_for(2))
    if not data:
        raise SystemExit(1)  # the server exited or no longer needs the disk
    return _decode_request(data), passed(ancillary)


def argv(fd: int) -> list[str]:
    """The command line that starts a worker on descriptor ``fd``."""
    return own_command("image-worker", "hypeman.images.worker", fd)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
