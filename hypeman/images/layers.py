"""Applies layers in order to an in-memory file tree. Pure.

The tree is never written to a host file system: it goes straight into the root disk (``erofs.py``).
So a layer cannot write outside its root, follow host links, leave a setuid program or device node on
the host, or exhaust its inodes; the checks here only reject what no valid layer contains.

    name in the archive            what happens
    a/b                            parents are looked up (and made, 0755 root), then the entry replaces
                                   what is there; a directory over a directory keeps its children
    a/.wh.b                        b of the layers below is removed
    a/.wh..wh..opq                 everything in a that came from the layers below is removed
    a/.wh..wh.x                    left-overs of AUFS: ignored
    hard link                      one more name for a node of this layer or one below

Names are cleaned as other tools do: ``/a``, ``../a`` and ``b/../a`` all mean ``a``. Symbolic links in the
middle of a path are followed inside the tree, an absolute one from its root; ``..`` in the root stays there,
as in a chroot. Directories that a link leads to are made if they are missing. Whiteouts only touch what
came from the layers below, whatever the order within a layer's archive. An archive that is not a layer
(a volume's) has none: there, such names are ordinary files.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from typing import Any

from hypeman.images.nodes import ENOUGH, Directory, Node, Shelf
from hypeman.images.tar import Entry, Kind, TarError, TarReader, TooLarge

MAX_LINKS_FOLLOWED = 40
"""As in Linux."""
MAX_NAME = 255
MAX_PATH = 4096
MAX_TARGET = 4095
MAX_XATTR_NAME = 255
MAX_XATTR_VALUE = 0xFFFF
MAX_XATTRS_TOTAL = 0xF000
"""Of one entry, in bytes."""
MAX_METADATA = 256 << 20
"""Total bytes of names, link targets and extended attributes of an image, which are kept in memory."""
MAX_STEPS = 8192
"""Path components visited per entry, including those of links."""

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."


class LayerError(TarError):
    """A layer that cannot be applied; the message names the entry."""


class TooMany(LayerError, TooLarge):
    """Too many entries."""


class Sink:
    """Where the data of files goes while a layer is read."""

    def store(self, node: Node, entry: Entry, read: Callable[[int], bytes]) -> None:
        """Take the data of ``entry`` (``read(n)`` gives the next n stored bytes) and set ``node.content``."""
        raise NotImplementedError

    def discard(self, node: Node) -> None:
        """``node`` lost its last name; its data is no longer needed."""
        raise NotImplementedError

    def settle(self) -> None:
        """Finish pending work of ``store``: the content of all nodes is about to be packed."""


class Tree:
    """The merged file tree of the layers applied so far."""

    def __init__(self, *, max_entries: int = 2_000_000, enough: int = ENOUGH, whiteouts: bool = True) -> None:
        """``enough``: maximum of unpacked files (``nodes.py``)."""
        self._whiteouts = whiteouts
        self._shelf = Shelf(enough=enough)
        self.root = self._shelf.directory(0o755, 0, None)
        self._max_entries = max_entries
        self.entries = 0
        """Names in the tree."""
        self._here = self.root
        """Directory of the last entry: the next one is likely to be there too."""
        self._layer = 0
        self._linked: set[tuple[Directory, bytes]] = set()
        """Names given by the current layer to nodes of lower layers."""
        self._pruned: set[Directory] = set()
        """Directories without anything from lower layers, not searched again: otherwise an archive of
        whiteouts alone could run indefinitely."""
        self._metadata = 0

    def apply(self, reader: TarReader, sink: Sink) -> None:
        """Apply one layer on top of the previous ones. Raises TarError; the tree is then unusable."""
        self._layer += 1
        self._linked.clear()
        self._pruned.clear()
        shelf = self._shelf
        while (entry := reader.next_entry()) is not None:
            shelf.made += 1
            # Limited by the entries read, or a layer could cause endless packing and unpacking of a million files.
            if shelf.full and shelf.unpacked <= 4 * shelf.made:
                sink.settle()
                shelf.pack(besides=self._here)
            try:
                self._apply(entry, reader, sink)
            except LayerError as error:
                raise type(error)(f"entry {_shown(entry.name)} {error}") from None

    def walk(self) -> Iterator[tuple[Directory, bytes, Node]]:
        """(parent, name, node) of everything below the root; parents first, names in byte order.

        Only directories and hard links may be kept across iterations.
        """
        waiting = [self.root]
        while waiting:
            directory = waiting.pop()
            children = directory.children
            for name in sorted(children):
                node = children[name]
                yield directory, name, node
                if self._shelf.full:
                    self._shelf.pack(besides=directory)
                if isinstance(node, Directory):
                    waiting.append(node)

    def _apply(self, entry: Entry, reader: TarReader, sink: Sink) -> None:
        parts = _split(entry.name)
        if not parts:
            if entry.kind is not Kind.DIRECTORY:
                raise LayerError("would replace the root by something that is not a directory")
            self._describe(self.root, entry)
            return
        name = parts.pop()
        if self._whiteouts and name.startswith(_WHITEOUT):
            self._whiteout(parts, name, sink)
            return
        parent = self._here = self._parent(parts)
        present = parent.children.get(name)
        if entry.kind is Kind.HARD_LINK:
            self._link(parent, name, present, entry, sink)
            return
        if entry.kind is Kind.DIRECTORY and isinstance(present, Directory):
            self._describe(present, entry)
            return
        if present is not None:
            self._drop(parent, name, present, sink)
        node: Node
        if entry.kind is Kind.DIRECTORY:
            node = self._shelf.directory(0, self._layer, parent)
        else:
            node = Node(int(entry.kind), self._layer)
            node.links = 1
        self._describe(node, entry)
        if entry.kind is Kind.FILE:
            node.size = entry.size
            sink.store(node, entry, reader.data)
        elif entry.kind is Kind.SYMLINK:
            if not 0 < len(entry.target) <= MAX_TARGET:
                raise LayerError(f"is a symbolic link with a target of {len(entry.target)} bytes")
            node.content, node.size = entry.target, len(entry.target)
            self._count(node.size)
        elif entry.kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE):
            node.device = entry.device
        self._add(parent, name, node)

    def _describe(self, node: Node, entry: Entry) -> None:
        node.mode = stat.S_IFMT(node.mode) | entry.mode
        node.uid, node.gid = entry.uid, entry.gid
        node.mtime, node.mtime_ns = entry.mtime, entry.mtime_ns
        node.xattrs = entry.xattrs or None
        node.layer = self._layer
        if entry.xattrs:
            self._count(_check_xattrs(entry.xattrs))

    def _add(self, parent: Directory, name: bytes, node: Node) -> None:
        self.entries += 1
        if self.entries > self._max_entries:
            raise TooMany(f"is one more than the {self._max_entries} files that an image may have")
        parent.children[name] = node
        self._count(len(name))

    def _count(self, size: int) -> None:
        self._metadata += size
        if self._metadata > MAX_METADATA:
            raise TooMany(f"exceeds the {MAX_METADATA} bytes of names and attributes that an image may have")

    def _link(self, parent: Directory, name: bytes, present: Node | None, entry: Entry, sink: Sink) -> None:
        parts = _split(entry.target)
        holder = self._parent(parts[:-1], make=False) if parts else None
        node = holder.children.get(parts[-1]) if holder is not None else None
        if node is None:
            raise LayerError(f"is a hard link to {_shown(entry.target)}, which does not exist in the image")
        if isinstance(node, Directory):
            raise LayerError(f"is a hard link to {_shown(entry.target)}, which is a directory")
        self._linked.add((parent, name))
        if node is present:
            return
        node.links += 1  # before the drop: the target may be inside what is replaced
        if present is not None:
            self._drop(parent, name, present, sink)
        self._add(parent, name, node)

    def _drop(self, parent: Directory, name: bytes, node: Node, sink: Sink) -> None:
        """Remove ``name`` and everything below it from the tree."""
        del parent.children[name]
        waiting = [node]
        while waiting:
            node = waiting.pop()
            self.entries -= 1
            if isinstance(node, Directory):
                waiting.extend(node.children.values())
                node.children.clear()
            else:
                node.links -= 1
                if not node.links:
                    sink.discard(node)

    def _whiteout(self, parts: list[bytes], name: bytes, sink: Sink) -> None:
        if name == _OPAQUE:
            parent = self._parent(parts, make=False)
            if parent is not None and parent not in self._pruned:
                self._pruned.add(parent)
                self._prune(list(parent.children.items()), parent, sink)
        elif not name.startswith(_AUFS):
            hidden = name[len(_WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise LayerError("is a whiteout of nothing that could exist")
            found = self._parent(parts, make=False)
            if found is not None and hidden in found.children:
                self._prune([(hidden, found.children[hidden])], found, sink)

    def _prune(self, items: list[tuple[bytes, Node]], parent: Directory, sink: Sink) -> None:
        """Remove those of ``items``, children of ``parent``, that came from lower layers.

        A directory is removed with everything below it, except what this layer added there and the
        directories leading to it.
        """
        # Each directory is visited twice: going down, then again after its children.
        waiting = [(parent, name, node, False) for name, node in items]
        while waiting:
            holder, name, node, children_done = waiting.pop()
            if isinstance(node, Directory) and node not in self._pruned and not children_done:
                self._pruned.add(node)
                waiting.append((holder, name, node, True))
                waiting.extend((node, below, child, False) for below, child in node.children.items())
            elif isinstance(node, Directory) and node.children:
                pass  # leads to something of this layer
            elif node.layer < self._layer and (holder, name) not in self._linked:
                self._drop(holder, name, node, sink)

    def _parent(self, parts: list[bytes], *, make: bool = True) -> Any:
        """The directory that ``parts`` lead to. Missing ones are made, or None without ``make``.

        Links are followed inside the tree. A component that is neither directory nor link is refused.
        """
        here = self.root
        # Fast path without links: nearly every look-up ends here.
        for depth, part in enumerate(parts):
            child = here.children.get(part)
            if not isinstance(child, Directory):
                return self._follow(here, parts[depth:], make=make)
            here = child
        return here

    def _follow(self, here: Directory, parts: list[bytes], *, make: bool) -> Directory | None:
        waiting = parts[::-1]
        """Components still to go, the next one last."""
        followed = visited = 0
        while waiting:
            part = waiting.pop()
            visited += 1
            if visited > MAX_STEPS:
                raise LayerError("leads through too many directories")
            if part == b"..":
                here = here.parent  # that of the root is the root
                continue
            child = here.children.get(part)
            if isinstance(child, Directory):
                here = child
            elif child is not None and stat.S_ISLNK(child.mode):
                followed += 1
                if followed > MAX_LINKS_FOLLOWED:
                    raise LayerError("leads through too many symbolic links")
                if child.content.startswith(b"/"):
                    here = self.root
                steps = [step for step in child.content.split(b"/") if step not in (b"", b".")]
                waiting.extend(reversed(steps))
            elif not make:
                return None
            elif child is not None:
                raise LayerError(f"lies below {_shown(part)}, which is not a directory")
            else:
                made = self._shelf.directory(0o755, self._layer, here)
                self._add(here, part, made)
                here = made
        return here


def _split(name: bytes) -> list[bytes]:
    """Normalised components of a path below the root. Raises LayerError for an invalid name."""
    if len(name) > MAX_PATH or b"\0" in name:
        raise LayerError(f"has a name that is longer than {MAX_PATH} bytes or has a zero byte in it")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if len(part) > MAX_NAME:
            raise LayerError(f"has a component of {len(part)} bytes; file systems take {MAX_NAME}")
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return parts


def _check_xattrs(xattrs: dict[bytes, bytes]) -> int:
    """Their total bytes, after checking that a file system can store them."""
    total = 0
    for key, value in xattrs.items():
        if not 0 < len(key) <= MAX_XATTR_NAME or b"\0" in key or len(value) > MAX_XATTR_VALUE:
            raise LayerError(f"has an extended attribute {_shown(key)} that no file system can hold")
        total += len(key) + len(value) + 8
    if total > MAX_XATTRS_TOTAL:
        raise LayerError(f"has {total} bytes of extended attributes; at most {MAX_XATTRS_TOTAL} are allowed")
    return total


def _shown(name: bytes) -> str:
    """``name`` for an error message: printable, quoted, not too long."""
    text = name if len(name) <= 200 else name[:200] + b"..."
    return repr(text)[1:]
