"""The compiled masking of WebSocket payloads against its twin, and that the server uses it."""

from __future__ import annotations

import random

import pytest
from wsproto import frame_protocol

from hypeman._native import wsmask, wsmask_py
from hypeman.server import streams


def test_it_masks_as_its_twin_does() -> None:
    """Whatever the key, the length and the parts in which a payload comes."""
    rng = random.Random(1)
    for _ in range(300):
        key = rng.randbytes(4)
        ours, theirs = wsmask.Masker(key), wsmask_py.Masker(bytearray(key))
        for _ in range(rng.randrange(1, 6)):
            part = bytearray(rng.randbytes(rng.choice([0, 1, 2, 3, 4, 7, 8, 9, 31, 1000])))
            before = bytes(part)
            assert ours.process(part) == theirs.process(part)
            assert part == before, "the input is not changed"


@pytest.mark.skipif(not wsmask.NATIVE, reason="the extension is not built")
def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="four bytes"):
        wsmask.Masker(b"abc")


def test_the_server_uses_it() -> None:
    assert streams.WEBSOCKETS
    assert getattr(frame_protocol, "XorMaskerSimple") is wsmask.Masker  # noqa: B009


def test_a_part_is_unmasked_as_its_twin_does() -> None:
    rng = random.Random(2)
    for _ in range(500):
        data, key = rng.randbytes(rng.choice([0, 1, 7, 8, 9, 64, 1000])), rng.randbytes(4)
        begin, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        part = wsmask.unmasked(data, begin, end, key, before := rng.randrange(10))
        assert part == wsmask_py.unmasked(data, begin, end, key, before)
        assert part == bytes(byte ^ key[(at + before) % 4] for at, byte in enumerate(data[begin:end]))
    for wrong in ((b"abc", 0, 4, key, 0), (b"abc", 2, 1, key, 0), (b"abc", 0, 1, b"abc", 0), (b"abc", 0, 1, key, -1)):
        for either in (wsmask, wsmask_py):
            with pytest.raises(ValueError, match="outside of the data"):
                either.unmasked(*wrong)
