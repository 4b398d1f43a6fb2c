"""Receives the frames of ``protocol.py`` with the descriptors that come with them; the same for both sides."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence

from hypeman.egress.protocol import MAX_DESCRIPTORS, Frame, ProtocolError
from hypeman.host.descriptors import passed, room_for

ANCILLARY = room_for(MAX_DESCRIPTORS)
FLAGS = socket.MSG_CMSG_CLOEXEC
"""Pass both to ``recvmsg_into``, with ``Receiver.room()``."""


class Receiver:
    """One frame after the other."""

    def __init__(self) -> None:
        self._frame = Frame()
        self._descriptors: list[int] = []

    def room(self) -> memoryview:
        """Where the next bytes belong."""
        return self._frame.room()

    @property
    def complete(self) -> bool:
        return self._frame.complete

    def take(self, count: int, ancillary: Iterable[tuple[int, int, bytes]], flags: int) -> None:
        """``count`` bytes were received into ``room()``. Raises ProtocolError, and EOFError at the end."""
        self._descriptors += passed(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors were lost")
        if not count:
            raise EOFError
        self._frame.add(count)

    def finish(self) -> tuple[Frame, list[int]]:
        """The complete frame and its descriptors, which are the caller's now; the next frame begins."""
        frame, self._frame = self._frame, Frame()
        descriptors, self._descriptors = self._descriptors, []
        return frame, descriptors

    def close(self) -> None:
        """Wipe and close what has been received of a frame."""
        frame, descriptors = self.finish()
        frame.wipe()
        close_all(descriptors)


def check_descriptors(frame: Frame, descriptors: Sequence[int]) -> None:
    """Raises ProtocolError unless as many came as were announced."""
    assert frame.header is not None
    if frame.header.descriptors != len(descriptors):
        raise ProtocolError("another number of descriptors than announced")


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
