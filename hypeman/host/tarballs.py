"""Packs directories into one compressed file, with holes, owners and times: GNU tar and Zstandard.

The frame has a checksum and an end mark, so that a truncated or altered file is refused when it is read.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import zstandard

from hypeman.host.files import HostError

_LEVEL = 3
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_KEEP = ("--sparse", "--numeric-owner", "--hard-dereference")


def pack(target: Path, parts: Sequence[tuple[Path, Iterable[str]]]) -> None:
    """Write a new file ``target`` (0600) with entries of directories, named relative to them.

    Directories are not descended into: name what is in them. Raises HostError; then there is no file.
    """
    half = target.with_name(target.name + ".part")
    with contextlib.ExitStack() as undo:
        try:
            lists = Path(undo.enter_context(tempfile.TemporaryDirectory()))
            out = undo.enter_context(open(half, "xb", opener=_private))
            undo.callback(half.unlink, missing_ok=True)
            argv = ["tar", "--create", *_KEEP, "--no-recursion", "--null"]
            for number, (directory, names) in enumerate(parts):
                (lists / str(number)).write_bytes(b"".join(os.fsencode(name) + b"\0" for name in names))
                argv += ["--directory", str(directory), f"--files-from={lists / str(number)}"]
            compressor = zstandard.ZstdCompressor(level=_LEVEL, threads=-1, write_checksum=True)
            with _tar(argv, stdout=subprocess.PIPE) as tar:
                assert tar.stdout is not None
                compressor.copy_stream(tar.stdout, out)
            os.fsync(out.fileno())
            os.link(half, target)  # never replaces another file
        except FileExistsError as error:
            raise HostError(f"{error.filename2 or error.filename} already exists") from None
        except OSError as error:
            raise HostError(f"{target} cannot be written: {error}") from error


@contextlib.contextmanager
def _tar(
    argv: Sequence[str], *, stdin: int | None = None, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A tar that must end well; it is ended where the block fails. Raises HostError with what it said."""
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(argv, env=_ENVIRONMENT, stdin=stdin, stdout=stdout, stderr=errors) as tar:
            try:
                yield tar
            except BaseException:
                tar.kill()
                raise
        if tar.returncode:
            errors.seek(0)
            raise HostError(f"tar: {errors.read(2000).decode(errors='replace').strip() or tar.returncode}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
