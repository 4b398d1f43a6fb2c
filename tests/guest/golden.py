"""Conversations between host and guest, byte by byte; both sides are held to the same files.

A file has lines "> " (host to guest), "< " (guest to host) and "# " (comment), each with bytes in hexadecimal.
The token and the nonce are fixed. The zero bytes before the greeting are not in the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

DIRECTORY = Path(__file__).parents[1] / "golden" / "guest"
TOKEN = b"golden token 16B"
NONCE = bytes(range(16))


def read(path: Path) -> Iterator[tuple[str, bytes]]:
    """Direction and bytes, in order."""
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            yield line[0], bytes.fromhex(line[2:])


def names() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.txt"))
