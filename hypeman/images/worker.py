"""The process that turns layers into a disk: a program of its own, with next to no rights.

Everything that reads an image's bytes (decompression, tar, xattrs) happens here, as an ordinary
user, without network, without a way to get rights back, and with limits on memory and file size.
It owns no path: the server hands it open files over a socket. So a flaw in a decompressor is no
way into the host, and the server's own requests do not wait for the interpreter lock.

    server → worker   Begin (with the disk and a scratch file), Layer … (with the blob), Finish
    worker → server   Progress …, Applied for each layer, then Done; or Failed, and it ends

One JSON message a packet (``SOCK_SEQPACKET``). Layers are handed over as they arrive, in order.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import hashlib
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import msgspec

from hypeman.images.erofs import Writer
from hypeman.images.layers import Tree
from hypeman.images.manifest import Compression
from hypeman.images.tar import Source, TarError, TarReader
from hypeman.images.unpack import unpack

MAX_MESSAGE = 64 << 10
_NOBODY = 65534
_MEMORY_LIMIT = 3 << 30
_TIME_LIMIT = 3600
"""Seconds of processor time; the largest image that is allowed by default needs a sixth of it."""
_CHUNKS_AHEAD = 8
_PROGRESS_INTERVAL = 0.25
"""Seconds between reports."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Comes with two open files: the disk and a scratch file."""

    max_bytes: int
    """Of the disk, and of all layers unpacked."""
    max_entries: int
    uuid: str
    """Hex; of the file system."""


class Layer(msgspec.Struct, frozen=True, tag=True):
    """Comes with the blob, open for reading."""

    digest: str
    diff_id: str
    compression: Compression


class Finish(msgspec.Struct, frozen=True, tag=True):
    pass


class Progress(msgspec.Struct, frozen=True, tag=True):
    bytes: int
    """Of unpacked layers so far."""


class Applied(msgspec.Struct, frozen=True, tag=True):
    digest: str


class Done(msgspec.Struct, frozen=True, tag=True):
    size: int
    """Of the disk."""
    entries: int
    content_bytes: int
    """What the files take in a file system that does not compress, in blocks of 4 KiB."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    message: str
    blame_image: bool
    """The image is at fault, not the host."""


Request = Begin | Layer | Finish
Report = Progress | Applied | Done | Failed

_encode = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(Request).decode


def main(fd: int) -> int:
    """Serve one conversion on the socket ``fd``; the exit code of the process."""
    with socket.socket(fileno=fd) as link:
        try:
            confine()
            threading.Thread(target=_end_with, args=(link,), daemon=True).start()
            _convert(link)
        except (TarError, ValueError) as error:
            return _fail(link, str(error), blame_image=True)
        except TimeoutError as error:
            return _fail(link, str(error), blame_image=True)
        except MemoryError:
            return _fail(link, "the image has more files than fit into memory", blame_image=True)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            text = "the disk is full" if full else f"the disk can not be written: {error.strerror}"
            return _fail(link, text, blame_image=False)
    return 0


def confine() -> None:
    """Give up all rights, for good. What the host does not allow us to give up is kept."""
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
    """End when the server does. Not by PR_SET_PDEATHSIG: that fires as soon as the *thread* that
    started us ends, and the server's threads come and go."""
    poller = select.poll()
    poller.register(link, 0)  # hang-ups are told without being asked for
    poller.poll()
    os._exit(1)


def _fail(link: socket.socket, message: str, *, blame_image: bool) -> int:
    with contextlib.suppress(OSError):
        link.send(_encode(Failed(message[:2000], blame_image)))
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
        """Give the space back; on a file system that has no holes it stays unused."""
        punch_hole = 0x01 | 0x02
        self._libc.fallocate(self._fd, punch_hole, ctypes.c_int64(offset), ctypes.c_int64(length))


def _convert(link: socket.socket) -> None:
    begin, files = _receive(link)
    if not isinstance(begin, Begin) or len(files) != 2:
        raise ValueError("the conversion was begun in the wrong order")
    libc = ctypes.CDLL(None, use_errno=True)
    disk = files[0]
    report = _Reporter(link)
    threads = max(1, min(4, (os.cpu_count() or 1)))
    with ThreadPoolExecutor(threads) as pool:
        writer = Writer(_FileOutput(disk, libc), _FileOutput(files[1], libc), pool, max_bytes=begin.max_bytes)
        tree = Tree(max_entries=begin.max_entries)
        left = begin.max_bytes
        while True:
            request, blobs = _receive(link)
            if isinstance(request, Finish):
                break
            assert isinstance(request, Layer)
            try:
                left -= _apply(request, blobs[0], tree, writer, left, begin.max_entries, report)
            except TarError as error:
                raise TarError(f"layer {request.digest} {error}") from None
            finally:
                os.close(blobs[0])
            link.send(_encode(Applied(request.digest)))
        size, content = writer.finish(tree, uuid=bytes.fromhex(begin.uuid))
    os.ftruncate(disk, size)
    os.fsync(disk)
    link.send(_encode(Done(size, tree.entries, content)))


def _apply(layer: Layer, blob: int, tree: Tree, writer: Writer, limit: int, max_entries: int, report: _Reporter) -> int:
    """Apply one layer; the bytes that it was unpacked."""
    digest = hashlib.sha256()
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        data = os.pread(blob, size, at)  # not read: the server's descriptor has the same position
        at += len(data)
        return data

    def plain() -> Iterator[bytes]:
        for chunk in unpack(read, layer.compression):
            digest.update(chunk)
            yield chunk

    with _in_thread(plain()) as chunks:
        source = Source(report.counted(chunks), limit=limit)
        tree.apply(TarReader(source, max_entries=max_entries), writer)
        # None of what follows the archive was looked at, but it is part of the digest.
        source.drain()
    if "sha256:" + digest.hexdigest() != layer.diff_id:
        raise TarError(f"is not what the image's config says: it unpacks to sha256:{digest.hexdigest()}")
    return source.total


class _Reporter:
    """Counts unpacked bytes and tells them now and then."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._bytes = 0
        self._next = time.monotonic() + _PROGRESS_INTERVAL

    def counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._bytes += len(chunk)
            if time.monotonic() >= self._next:
                self._link.send(_encode(Progress(self._bytes)))
                self._next = time.monotonic() + _PROGRESS_INTERVAL
            yield chunk


@contextlib.contextmanager
def _in_thread(chunks: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """Run ``chunks`` in a thread, a few ahead: decompression beside parsing and compression."""
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
    data, ancillary, _, _ = link.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(2 * 4))
    files = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(payload[: len(payload) - len(payload) % 4])
    if not data:
        raise SystemExit(1)  # the server is gone, or does not want the disk any more
    return _decode_request(data), list(files)


def argv(fd: int) -> list[str]:
    """The command line that starts a worker on descriptor ``fd``, from source or from the bundle."""
    if getattr(sys, "frozen", False):
        return [sys.executable, "@image-worker", str(fd)]
    return [sys.executable, "-m", "hypeman.images.worker", str(fd)]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
