"""The context of a build: a directory as a tar, without what ``.dockerignore`` excludes.

Patterns are those of Docker: relative to the directory, ``*`` and ``?`` within a name, ``**`` for any number of
directories, ``!`` for exceptions; the last one that matches a path, or a directory above it, decides.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from hypeman.cli.session import warn


class Ignore:
    """The patterns of one ignore file. Pure."""

    def __init__(self, text: str) -> None:
        self.rules: list[tuple[re.Pattern[str], bool]] = []
        """Pattern, and whether what it matches is ignored."""
        for line in text.removeprefix("\ufeff").splitlines():
            pattern = line.strip()
            if not pattern or line.startswith("#"):
                continue
            ignored = not pattern.startswith("!")
            parts = [part for part in pattern.removeprefix("!").strip().split("/") if part not in ("", ".")]
            if parts:
                self.rules.append((re.compile(_regular(parts)), ignored))

    def ignores(self, path: str) -> bool:
        """Whether ``path``, relative and with slashes, is left out."""
        names = path.split("/")
        prefixes = ["/".join(names[:end]) for end in range(1, len(names) + 1)]
        found = False
        for pattern, ignored in self.rules:
            if ignored is not found and any(pattern.fullmatch(prefix) for prefix in prefixes):
                found = ignored
        return found

    @property
    def has_exceptions(self) -> bool:
        """An ignored directory may have files that are not."""
        return any(not ignored for _, ignored in self.rules)


def _regular(parts: Sequence[str]) -> str:
    text = ""
    for at, part in enumerate(parts):
        last = at == len(parts) - 1
        if part == "**":
            text += ".*" if last else "(?:.*/)?"
            continue
        text += _name(part) + ("" if last else "/")
    return text


def _name(part: str) -> str:
    """One name of a pattern as a regular expression."""
    text, at = "", 0
    while at < len(part):
        character = part[at]
        if character == "*":
            text += ".*" if part[at : at + 2] == "**" else "[^/]*"
            at += 2 if part[at : at + 2] == "**" else 1
            continue
        if character == "?":
            text += "[^/]"
        elif character == "\\" and at + 1 < len(part):
            at += 1
            text += re.escape(part[at])
        elif character == "[" and (end := part.find("]", at + 2)) > 0:
            inside = part[at + 1 : end].replace("\\", "\\\\")
            text += f"[{'^' + inside[1:] if inside[0] in '!^' else inside}]"
            at = end
        else:
            text += re.escape(character)
        at += 1
    return text


def write_context(directory: Path, output: IO[bytes], *, dockerfile: str | None) -> int:
    """Write the tar.gz of ``directory``; returns the number of its entries. ``dockerfile``: its path in the directory,
    or None if it is elsewhere. It and the ignore file are part of every context: BuildKit reads them itself."""
    ignore = Ignore(ignore_text(directory, dockerfile))
    kept = {".dockerignore", *((dockerfile, f"{dockerfile}.dockerignore") if dockerfile else ())}
    return _write(directory, _walk(directory, "", ignore, kept), output, keep_owners=False)


def write_directory(directory: Path, output: IO[bytes]) -> int:
    """Write the tar.gz of all of ``directory``, with its owners; returns the number of its entries."""
    return _write(directory, entries(directory), output, keep_owners=True)


def entries(directory: Path, ignore: Ignore | None = None) -> Iterator[str]:
    """Paths below ``directory``, each directory before what is in it, in a fixed order."""
    return _walk(directory, "", ignore or Ignore(""), set())


def _write(directory: Path, paths: Iterable[str], output: IO[bytes], *, keep_owners: bool) -> int:
    count = 0
    with tarfile.open(fileobj=output, mode="w:gz", compresslevel=1, format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            entry = tar.gettarinfo(directory / path, arcname=path)
            if not keep_owners:
                entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            if entry.isreg():
                with open(directory / path, "rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
            count += 1
    return count


def ignore_text(directory: Path, dockerfile: str | None = None) -> str:
    """The patterns of the ignore file of a context; empty if it has none."""
    names = [f"{dockerfile}.dockerignore"] if dockerfile else []
    for name in (*names, ".dockerignore"):
        path = directory / name
        if path.is_file():
            return path.read_text(errors="replace")
    return ""


def _walk(directory: Path, below: str, ignore: Ignore, kept: set[str]) -> Iterator[str]:
    with os.scandir(directory / below) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        ignored = ignore.ignores(path) and path not in kept
        is_directory = entry.is_dir(follow_symlinks=False)
        if is_directory:
            needed = any(other.startswith(f"{path}/") for other in kept)
            if ignored and not ignore.has_exceptions and not needed:
                continue
            inside = list(_walk(directory, path, ignore, kept)) if ignored else None
            if inside is None:
                yield path
                yield from _walk(directory, path, ignore, kept)
            elif inside:
                yield path
                yield from inside
            continue
        if ignored:
            continue
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            yield path
        else:
            warn(f"{path!r} is neither file, directory nor link; it is skipped")


def place_in(directory: Path, file: Path) -> str | None:
    """Path of ``file`` relative to ``directory``, with slashes; None if it is not inside."""
    try:
        return str(PurePosixPath(*file.resolve().relative_to(directory.resolve()).parts))
    except ValueError:
        return None
