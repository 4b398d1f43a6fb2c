"""The host's end of a session: what is sent when the guest has room for part of it."""

from __future__ import annotations

from typing import cast

import trio
from hypothesis import given
from hypothesis import strategies as st

from hypeman.guest.channel import Session
from hypeman.guest.client import GuestClient


class Guest:
    """In the place of a GuestClient: has room for so many bytes at each look, then for all."""

    def __init__(self, rooms: list[int]) -> None:
        self.rooms = rooms
        self.received = b""

    def window(self, session: int) -> int:
        return self.rooms.pop(0) if self.rooms else 1 << 20

    def check_alive(self) -> None:
        pass

    async def send(self, session: Session, data: bytes) -> None:
        self.received += data


@given(
    st.binary(max_size=200), st.lists(st.integers(1, 250), max_size=4), st.sampled_from([bytes, bytearray, memoryview])
)
def test_data_is_sent_once_whatever_room_there_is(data: bytes, rooms: list[int], kind: type) -> None:
    guest = Guest(rooms)
    session = Session(cast(GuestClient, guest), 1)
    trio.run(session.send, kind(data))
    assert guest.received == data
