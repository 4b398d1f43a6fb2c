"""SPDY frames: what kubectl's library writes is read, what is malformed ends the connection."""

from __future__ import annotations

import contextlib
import struct
import zlib
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hypeman.kube.kubelet import portforward, spdy


class Client:
    """Frames as a client writes them."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(zdict=spdy.DICTIONARY)

    def syn_stream(self, stream: int, **headers: str) -> bytes:
        plain = struct.pack(">I", len(headers))
        for name, value in headers.items():
            for text in (name, value):
                plain += struct.pack(">I", len(text)) + text.encode()
        block = self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return control(1, struct.pack(">IIH", stream, 0, 0) + block)


def control(kind: int, body: bytes, *, version: int = 3) -> bytes:
    return struct.pack(">HH", 0x8000 | version, kind) + b"\0" + len(body).to_bytes(3) + body


def test_the_dictionary_is_the_specifications() -> None:
    assert len(spdy.DICTIONARY) == 1423
    assert zlib.adler32(spdy.DICTIONARY) == 0xE3C6A7C2  # as the header of every compressed block names it


@given(st.lists(st.integers(1, 40), max_size=30))
def test_frames_arrive_in_any_pieces(cuts: list[int]) -> None:
    client = Client()
    whole = client.syn_stream(1, streamtype="error", port="80", requestid="0")
    whole += client.syn_stream(3, streamtype="data", port="80", requestid="0")
    whole += struct.pack(">I", 3) + b"\0" + (5).to_bytes(3) + b"hello"
    whole += control(4, b"settings") + control(6, struct.pack(">I", 7))
    whole += (
        struct.pack(">I", 3) + b"\1" + (0).to_bytes(3) + control(3, struct.pack(">II", 3, 5)) + control(7, b"\0" * 8)
    )
    framer, frames = spdy.Framer(), list[spdy.Frame]()
    for cut in cuts:
        frames += framer.feed(whole[:cut])
        whole = whole[cut:]
    frames += framer.feed(whole)
    assert frames == [
        spdy.SynStream(1, {"streamtype": "error", "port": "80", "requestid": "0"}),
        spdy.SynStream(3, {"streamtype": "data", "port": "80", "requestid": "0"}),
        spdy.Data(3, b"hello"),
        spdy.Ping(7),
        spdy.Data(3, b"", fin=True),
        spdy.Reset(3),
        spdy.GoAway(),
    ]


@pytest.mark.parametrize(
    "data",
    [
        control(1, b""),
        control(1, b"\0" * 10 + b"not zlib"),
        control(6, b"\0"),
        control(6, b"\0\0\0\1", version=2),
        struct.pack(">I", 1) + b"\0" + (spdy.MAX_FRAME + 1).to_bytes(3),
        control(1, b"\0" * 10 + zlib.compress(b"")),
    ],
)
def test_malformed_frames_end_the_connection(data: bytes) -> None:
    with pytest.raises(spdy.Malformed):
        list(spdy.Framer().feed(data))


def test_headers_are_bounded() -> None:
    """A small block may hold a gigabyte of zeros."""
    with pytest.raises(spdy.Malformed, match="too long"):
        list(spdy.Framer().feed(Client().syn_stream(1, port="0" * (spdy.MAX_HEADERS + 1))))


class Messages:
    """A WebSocket whose client sends ``frames`` and goes."""

    def __init__(self, *frames: bytes) -> None:
        self._frames = list(frames)
        self.sent = b""

    async def receive(self) -> bytes | None:
        await trio.testing.wait_all_tasks_blocked()
        return self._frames.pop(0) if self._frames else None

    async def send(self, data: bytes) -> None:
        self.sent += data


@pytest.mark.parametrize("port", ["80", "080000", "199999", "9" * 5000])
async def test_a_client_that_breaks_the_rules_ends_no_tunnel(port: str) -> None:
    """A stream whose number comes again, and data after its end."""
    ours, guest = trio.testing.memory_stream_pair()
    client, end = Client(), struct.pack(">I", 1) + b"\1" + (4).to_bytes(3) + b"data"
    first, again = (client.syn_stream(1, streamtype="data", port=each, requestid="0") for each in ("80", port))
    messages = Messages(first, again, end, end)

    async def dial(number: int) -> Any:
        return ours

    with trio.fail_after(10):
        await portforward.Tunnel(messages, dial).run()
        assert await guest.receive_some() == b"data"
    assert [type(each) for each in spdy.Framer().feed(messages.sent)] == [spdy.Reset]


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_malformed(data: bytes) -> None:
    framer = spdy.Framer()
    with contextlib.suppress(spdy.Malformed):
        list(framer.feed(data))
