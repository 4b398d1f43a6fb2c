"""``cp``: copies files and trees into and out of a guest, and tar streams with ``-``.

Data from a guest is untrusted: a path outside the destination or a byte count other than announced
aborts the copy, and a symlink that points outside is not created. Files appear complete or not at
all.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from hypeman.cli.client import Client
from hypeman.cli.complete import complete_guest_path
from hypeman.cli.instances import path_of
from hypeman.cli.progress import ByteCounter
from hypeman.cli.session import Session, fail, reports, warn

if TYPE_CHECKING:
    import tarfile

    from hypeman.cli.websocket import WebSocket

_CHUNK = 32 * 1024
_ZEROS = bytes(_CHUNK)


class CopyFailed(Exception):
    """The copy was aborted; the message says where."""


@click.command("cp")
@click.argument("source", shell_complete=complete_guest_path)
@click.argument("destination", shell_complete=complete_guest_path)
@click.option("-a", "--archive", is_flag=True, help="Keep owners and hard links too.")
@click.option("-L", "--follow-links", is_flag=True, help="Copy what symlinks lead to.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say how much was copied.")
@reports
def copy(session: Session, source: str, destination: str, archive: bool, follow_links: bool, quiet: bool) -> None:
    """Copy files between here and an instance.

    One side is INSTANCE:/PATH, the other a path here, or - for a tar on standard input or output. A
    directory is copied with all that is in it; if the destination is a directory, into it.
    """
    inside_from, inside_to = split_remote(source), split_remote(destination)
    if (inside_from is None) == (inside_to is None):
        raise click.UsageError("one side must be INSTANCE:/PATH, the other a path here")
    try:
        if inside_to is not None:
            sender = Sender(session.client, *inside_to, archive=archive, follow_links=follow_links)
            count = sender.send_tar(sys.stdin.buffer) if source == "-" else sender.send(source)
        else:
            assert inside_from is not None
            entries = receive(session.client, *inside_from, follow_links=follow_links)
            if destination == "-":
                count = write_tar(entries, sys.stdout.buffer)
            else:
                count = write_tree(entries, Path(destination), archive=archive)
    except CopyFailed as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or source}: {error.strerror or error}")
    if not quiet:
        click.echo(f"{count} bytes copied", err=True)


def split_remote(text: str) -> tuple[str, str] | None:
    """Instance and path of ``instance:/path``; None for a local path."""
    instance, colon, path = text.partition(":")
    return (instance, path) if colon and instance and "/" not in instance and path.startswith("/") else None


# ── Into the guest ───────────────────────────────────────────────────────────────────────────────


class Sender:
    """Copies into one instance: one stream per file, directory or link."""

    def __init__(self, client: Client, instance: str, path: str, *, archive: bool, follow_links: bool) -> None:
        self._client = client
        self._instance = instance
        self._path = path
        self._archive = archive
        self._follow_links = follow_links
        self._copied: dict[tuple[int, int], str] = {}
        """Target paths of files with several links, by device and inode."""

    def send(self, source: str) -> int:
        """Copy a file or tree; returns the bytes of all files."""
        contents_only = source.endswith("/.") or source == "."
        entered = contents_only or source.endswith("/")
        source = os.path.normpath(source)
        if not os.path.lexists(source):
            raise CopyFailed(f"{source} does not exist")
        root = self._root_for(os.path.basename(os.path.abspath(source)), contents_only)
        if os.path.isdir(source) and (entered or self._follow_links or not os.path.islink(source)):
            return self._send_tree(source, root)
        return self.send_file(source, root)

    def send_tar(self, stream: IO[bytes]) -> int:
        """Copy the entries of a tar to below the path."""
        import tarfile

        count = 0
        directories: list[tuple[str, dict[str, int]]] = []
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as tar:
                for member in tar:
                    target = self._place(member.name)
                    meta = self._meta(member.mode, int(member.mtime), member.uid, member.gid)
                    if member.isdir():
                        self._put(target, meta, None)
                        directories.append((target, meta))
                    elif member.isfile():
                        content = tar.extractfile(member)
                        assert content is not None
                        count += self._put(target, meta, content)
                    elif member.issym():
                        self._link(target, meta, member.linkname)
                    elif member.islnk():
                        self._hard_link(target, self._place(member.linkname))
                    else:
                        warn(f"{member.name} is not a file, directory or link, and is skipped")
        except tarfile.TarError as error:
            raise CopyFailed(f"standard input is not a tar archive: {error}") from None
        self._finish(directories)
        return count

    def _place(self, name: str) -> str:
        """Target path of a tar entry."""
        name = posixpath.normpath(name)
        if name.startswith("/") or name.split("/")[0] == "..":
            raise CopyFailed(f"the tar's entry {name!r} leads out of the destination")
        return posixpath.normpath(posixpath.join(self._path, name))

    def _root_for(self, name: str, contents_only: bool) -> str:
        """Target of the copy's root: inside the path if that is a directory, else the path itself."""
        query = {"path": self._path, "follow_links": True}
        from hypeman.cli.websocket import after_boot  # as in _open

        path = path_of(self._instance)
        there = after_boot(self._client, path, lambda: self._client.call("GET", f"{path}/stat", query=query))
        into = self._path.endswith("/") or (there["exists"] and there["is_dir"])
        return posixpath.join(self._path, name) if into and not contents_only else self._path.rstrip("/") or "/"

    def _send_tree(self, source: str, root: str) -> int:
        count = 0
        directories: list[tuple[str, dict[str, int]]] = []
        for directory, names, files in os.walk(source, onerror=_raise, followlinks=self._follow_links):
            below = os.path.relpath(directory, source)
            target = root if below == "." else posixpath.join(root, below)
            meta = self._meta_of(os.stat(directory))
            self._put(target, meta, None)
            directories.append((target, meta))
            if not self._follow_links:
                files += [name for name in names if os.path.islink(os.path.join(directory, name))]
            names.sort()
            for name in sorted(files):
                count += self.send_file(os.path.join(directory, name), posixpath.join(target, name))
        self._finish(directories)
        return count

    def _finish(self, directories: list[tuple[str, dict[str, int]]]) -> None:
        """Set the times of directories again, since writing entries into them has changed these."""
        for target, meta in reversed(directories):
            self._put(target, meta, None)

    def send_file(self, source: str, target: str) -> int:
        """Copy a file or symlink to exactly ``target``, with the directories above it; returns its bytes."""
        here = os.stat(source, follow_symlinks=self._follow_links)
        if stat.S_ISLNK(here.st_mode):
            self._link(target, self._meta_of(here), os.readlink(source))
            return 0
        if not stat.S_ISREG(here.st_mode):
            warn(f"{source} is not a file, directory or symlink, and is skipped")
            return 0
        first = self._copied.setdefault((here.st_dev, here.st_ino), target) if self._keeps_links(here) else target
        if first != target:
            self._hard_link(target, first)
            return 0
        with open(source, "rb") as content:
            return self._put(target, self._meta_of(here), content)

    def _keeps_links(self, here: os.stat_result) -> bool:
        return self._archive and here.st_nlink > 1

    def _meta_of(self, here: os.stat_result) -> dict[str, int]:
        return self._meta(stat.S_IMODE(here.st_mode), int(here.st_mtime), here.st_uid, here.st_gid)

    def _meta(self, mode: int, mtime: int, uid: int, gid: int) -> dict[str, int]:
        return {"mode": mode, "mtime": mtime, **({"uid": uid, "gid": gid} if self._archive else {})}

    def _put(self, target: str, meta: dict[str, int], content: IO[bytes] | None) -> int:
        """Copy one file, or a directory if ``content`` is None."""
        return self._send({"direction": "to", "guest_path": target, "is_dir": content is None, **meta}, content)

    def _link(self, target: str, meta: dict[str, int], leads_to: str) -> None:
        """Copy one symlink unchanged: its target is resolved in the guest."""
        try:
            self._send({"direction": "link", "guest_path": target, "link_target": leads_to, **meta}, None)
        except CopyFailed as error:
            raise CopyFailed(f"{error} (a symlink; -L copies what it leads to)") from None

    def _hard_link(self, target: str, first: str) -> None:
        """Create another link to the file copied to ``first``."""
        self._send({"direction": "hardlink", "guest_path": target, "link_target": first}, None)

    def _send(self, request: dict[str, Any], content: IO[bytes] | None) -> int:
        """Send one stream; returns the bytes that arrived."""
        try:
            first = msgspec.json.encode(request).decode()
        except UnicodeEncodeError:
            raise CopyFailed(f"{os.fsencode(request['guest_path'])!r}: a name or link that is not UTF-8") from None
        socket = _open(self._client, self._instance)
        try:
            socket.send(first)
            while content is not None and (chunk := content.read(_CHUNK)):
                socket.send(chunk)
            socket.send('{"type":"end"}')
            result = _json(socket.receive())
        finally:
            socket.close()
        if not result.get("success"):
            target = request["guest_path"]
            raise CopyFailed(f"{target}: {result.get('error') or result.get('message') or 'the stream ended early'}")
        return int(result.get("bytes_written") or 0)


def _raise(error: OSError) -> None:
    """Error handler, since ``os.walk`` silently skips what it cannot read."""
    raise error


# ── Out of the guest ─────────────────────────────────────────────────────────────────────────────


def receive(client: Client, instance: str, path: str, *, follow_links: bool) -> Iterator[dict[str, Any] | bytes]:
    """Headers, each followed by its bytes; every path and size is checked."""
    socket = _open(client, instance)
    counter = ByteCounter(path)
    try:
        request = {"direction": "from", "guest_path": path, "follow_links": follow_links}
        socket.send(msgspec.json.encode(request).decode())
        expected, header, final = 0, "", False
        while not final:
            message = socket.receive()
            if isinstance(message, bytes):
                expected -= len(message)
                yield message
                counter.add(len(message))
                continue
            frame = _json(message)
            match frame.get("type"):
                case "header":
                    header, expected = checked_path(frame), frame["size"]
                    if frame["is_dir"] or frame["is_symlink"]:
                        expected = 0
                    yield frame
                case "end":
                    if expected != 0:
                        raise CopyFailed(f"{header} does not have the size that was announced")
                    final = bool(frame.get("final"))
                case _:
                    raise CopyFailed(_named(instance, path, str(frame.get("message") or "the stream ended early")))
    finally:
        counter.end()
        socket.close()


def _named(instance: str, path: str, message: str) -> str:
    """``message`` with the whole name of what it is about; the guest names it from the last part of ``path`` on."""
    above, _, last = path.rstrip("/").rpartition("/")
    if last and message.startswith((f"{last}:", f"{last}/")):
        return f"{instance}:{above}/{message}"
    return f"{instance}:{path}: {message}"


def checked_path(header: dict[str, Any]) -> str:
    """The path of an entry, checked to stay below the destination."""
    path = str(header["path"])
    if path.startswith("/") or ".." in path.split("/") or not path.strip("/."):
        raise CopyFailed(f"the guest sent the path {path!r}, which leads out of the destination")
    return path


def write_tree(entries: Iterator[dict[str, Any] | bytes], destination: Path, *, archive: bool) -> int:
    """Write entries below ``destination``; returns the bytes of all files."""
    writer = TreeWriter(destination, archive=archive)
    try:
        for item in entries:
            if isinstance(item, bytes):
                writer.data(item)
            else:
                writer.entry(item)
        writer.finish()
    finally:
        writer.abandon()
    if writer.skipped and not writer.written:
        raise CopyFailed(f"nothing was copied: {writer.skipped} is a symlink; -L copies what it leads to")
    return writer.count


class TreeWriter:
    """Writes entries as files: each under a temporary name until it is complete. Directory modes are set last,
    since a read-only directory could not be filled.

    The guest chooses the entries, and the destination may contain anything. So every name is used relative to a
    descriptor of its directory, and each directory is opened without following symlinks: neither a link sent by
    the guest nor an existing one can redirect a later entry outside the destination.
    """

    def __init__(self, destination: Path, *, archive: bool) -> None:
        self.count = 0
        self.written = False
        """Whether an entry was not skipped."""
        self.skipped = ""
        """The last entry that was."""
        self._into = destination.is_dir()
        # The destination itself is chosen by the user: symlinks in its path are followed.
        self._base = destination if self._into else destination.parent
        self._name = destination.name
        self._archive = archive
        self._directories: dict[tuple[str, ...], dict[str, Any]] = {}
        """By path components. No later entry can replace one: none is removed for a link or a file."""
        self._file: io.BufferedWriter | None = None
        self._header: dict[str, Any] = {}

    def entry(self, header: dict[str, Any]) -> None:
        self._complete()
        self._header = header
        with self._parent(header) as (parent, name):
            if header["is_dir"]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=parent)
                os.close(self._open_directory(parent, name, header["path"]))
                self._directories[_words(header["path"])] = header
            elif header["is_symlink"] and leads_out(header, self._directories):
                warn(f"{header['path']} → {header['link_target']} leads out of what is copied and is skipped")
                self.skipped = header["path"]
                return
            elif header["is_symlink"]:
                if (there := _lstat(parent, name)) and not stat.S_ISDIR(there.st_mode):
                    os.unlink(name, dir_fd=parent)
                os.symlink(header["link_target"], name, dir_fd=parent)
                if self._archive:
                    os.chown(name, header["uid"], header["gid"], dir_fd=parent, follow_symlinks=False)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with contextlib.suppress(FileNotFoundError):  # left by a killed copy
                    os.unlink(_temporary(name), dir_fd=parent)
                self._file = os.fdopen(os.open(_temporary(name), flags, 0o600, dir_fd=parent), "wb")
        self.written = True

    def data(self, chunk: bytes) -> None:
        if self._file is None:
            raise CopyFailed("the guest sent bytes that belong to no file")
        if _ZEROS.startswith(chunk):
            self._file.seek(len(chunk), os.SEEK_CUR)  # preserve holes
        else:
            self._file.write(chunk)
        self.count += len(chunk)

    def finish(self) -> None:
        self._complete()
        for header in reversed(self._directories.values()):
            with self._parent(header) as (parent, name):
                directory = self._open_directory(parent, name, header["path"])
            try:
                self._set_attributes(directory, header)
            finally:
                os.close(directory)

    def abandon(self) -> None:
        """Remove an incomplete file."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        with contextlib.suppress(OSError, CopyFailed), self._parent(self._header) as (parent, name):
            os.unlink(_temporary(name), dir_fd=parent)

    def _complete(self) -> None:
        if self._file is None:
            return
        self._file.truncate()  # for a trailing hole; also flushes, since a later write would change the time
        self._set_attributes(self._file.fileno(), self._header)
        with self._parent(self._header) as (parent, name):
            os.rename(_temporary(name), name, src_dir_fd=parent, dst_dir_fd=parent)
        self._file.close()
        self._file = None

    def _set_attributes(self, fd: int, header: dict[str, Any]) -> None:
        if self._archive:
            os.fchown(fd, header["uid"], header["gid"])
        os.fchmod(fd, header["mode"] & 0o7777)
        os.utime(fd, (header["mtime"], header["mtime"]))

    @contextlib.contextmanager
    def _parent(self, header: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Descriptor of the entry's directory, and the entry's name in it. The root entry is named after the
        destination, unless that is a directory to copy into."""
        path = header["path"]
        words = list(_words(path))
        if not self._into:
            words[0] = self._name
        here = os.open(self._base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for word in words[:-1]:
                below = self._open_directory(here, word, path)
                os.close(here)
                here = below
            yield here, words[-1]
        finally:
            os.close(here)

    @staticmethod
    def _open_directory(parent: int, name: str, path: str) -> int:
        try:
            return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except OSError as error:
            if (there := _lstat(parent, name)) and stat.S_ISLNK(there.st_mode):
                raise CopyFailed(f"{path}: {name} is a symlink, and is not followed") from None
            error.filename = path
            raise


def leads_out(header: dict[str, Any], directories: Collection[tuple[str, ...]]) -> bool:
    """Whether a symlink points outside the copy, or could later do so.

    Resolved as the kernel does: after a component that is a symlink, ``..`` is the parent of the link's target. A
    component not in ``directories``, those created by this copy, may be or become a link, so ``..`` after it counts
    as pointing outside.
    """
    target, path = str(header["link_target"]), _words(header["path"])
    if target.startswith("/"):
        return True
    here = path[:-1]
    real = {path[:end] for end in range(1, len(path))} | {*directories}
    for word in _words(target):
        if word != "..":
            here = (*here, word)
        elif here in real and len(here) > 1:
            here = here[:-1]
        else:
            return True
    return here[:1] != path[:1]


def _words(path: str) -> tuple[str, ...]:
    return tuple(word for word in str(path).split("/") if word not in ("", "."))


def _lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _temporary(name: str) -> str:
    short = os.fsdecode(os.fsencode(name)[:200].decode(errors="ignore").encode())
    return f".{short}.{os.getpid()}.part"


def write_tar(entries: Iterator[dict[str, Any] | bytes], stream: IO[bytes]) -> int:
    """Write entries as a tar in constant memory, since a tar header only needs the size."""
    import tarfile

    if stream.isatty():
        raise CopyFailed("a tar archive is not written to a terminal; send standard output to a file or a pipe")
    count = 0
    padding = 0
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for item in entries:
            if isinstance(item, bytes):
                _raw(tar, item)
                count += len(item)
                continue
            _raw(tar, b"\0" * padding)
            info = _tar_info(tarfile.TarInfo(item["path"]), item)
            tar.addfile(info)
            padding = -info.size % tarfile.BLOCKSIZE
        _raw(tar, b"\0" * padding)
    return count


def _tar_info(info: tarfile.TarInfo, header: dict[str, Any]) -> tarfile.TarInfo:
    info.mode, info.mtime = header["mode"] & 0o7777, header["mtime"]
    info.uid, info.gid = header["uid"], header["gid"]
    if header["is_dir"]:
        info.type = b"5"  # a directory
    elif header["is_symlink"]:
        info.type, info.linkname = b"2", header["link_target"]
    else:
        info.size = header["size"]
    return info


def _raw(tar: tarfile.TarFile, data: bytes) -> None:
    """Write bytes of a member after its header; ``addfile`` without a file object writes only the header."""
    assert tar.fileobj is not None
    tar.fileobj.write(data)
    tar.offset += len(data)


def _open(client: Client, instance: str) -> WebSocket:
    from hypeman.cli.websocket import open_stream  # its imports take longer than most commands

    return open_stream(client, path_of(instance), "cp")


def _json(message: str | bytes | None) -> dict[str, Any]:
    if message is None:
        return {}
    frame = msgspec.json.decode(message)
    return frame if isinstance(frame, dict) else {}
