"""What a guest can make the server keep of what it sends in one session."""

from __future__ import annotations

import itertools
import sys

import pytest
import trio.testing

from hypeman.guest.channel import Session
from hypeman.guest.client import GuestClient
from hypeman.guest.protocol import WINDOW, Data


def kept(session: Session) -> int:
    """Bytes of memory."""
    return sum(sys.getsizeof(chunk) + sys.getsizeof(chunk.data) for chunk in session.chunks)


@pytest.mark.parametrize("streams", [(False,), (False, True)], ids=["one stream", "both in turn"])
@pytest.mark.parametrize("sizes", [(1,), (1, 4096), (4095, 1)], ids=str)
async def test_a_window_of_tiny_frames_is_kept_in_little_memory(
    streams: tuple[bool, ...], sizes: tuple[int, ...]
) -> None:
    """As many frames as a window allows, of an agent of any version, while nothing is read."""
    client = GuestClient(trio.testing.memory_stream_pair()[0], nonce=bytes(16))
    session = Session(client, 1)
    sent = {False: bytearray(), True: bytearray()}
    total = 0
    for stderr, size, letter in zip(itertools.cycle(streams), itertools.cycle(sizes), itertools.count()):
        if total + size > WINDOW:
            break
        data = bytes([letter % 251]) * size
        session.put(Data(1, data, stderr))
        sent[stderr] += data
        total += size
    assert kept(session) < 3 * WINDOW
    got = {False: bytearray(), True: bytearray()}
    while session.chunks:
        chunk = session.chunks.popleft()
        got[chunk.stderr] += chunk.data
    assert got == sent, "each stream whole and in order"
