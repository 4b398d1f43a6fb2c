"""A block of lines in the host's hosts file that is ours; all else in the file stays as it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_BEGIN, _END = "# BEGIN hypeman: written by the server, changes are lost\n", "# END hypeman\n"


def render(text: str, lines: Iterable[str]) -> str:
    """``text`` with ``lines`` as our block, at its end; without any, without the block."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and not end:  # the end mark was removed: what follows may not be ours
        after = "".join(line for line in rest.splitlines(keepends=True) if "\t" not in line)
    kept = before + after
    block = "".join(f"{line}\n" for line in lines)
    if not block:
        return kept
    if kept and not kept.endswith("\n"):
        kept += "\n"
    return f"{kept}{_BEGIN}{block}{_END}"


def write_block(path: Path, lines: Iterable[str]) -> bool:
    """Make ``lines`` our block in the file; whether it changed. Blocking; raises OSError.

    The file is written in place: where it is a mount of its own, as in the unit's view, it cannot be replaced.
    """
    with open(path, "r+") as file:
        text = file.read()
        wanted = render(text, lines)
        if wanted == text:
            return False
        file.seek(0)
        file.write(wanted)
        file.truncate()
    return True
