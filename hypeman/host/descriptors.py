"""File descriptors passed with messages over unix sockets: SCM_RIGHTS, see unix(7)."""

from __future__ import annotations

import array
import socket
from collections.abc import Iterable, Sequence
from typing import Any


def passing(descriptors: Sequence[int]) -> list[tuple[int, int, Any]]:
    """Ancillary data for ``sendmsg`` that passes ``descriptors``, which stay open here."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []


def room_for(count: int) -> int:
    """Size of the ancillary data in which ``recvmsg`` can receive ``count`` descriptors."""
    return socket.CMSG_SPACE(4 * count)


def passed(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message; the caller closes them."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) // 4 * 4])
    return list(found)
