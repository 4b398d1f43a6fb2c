"""XOR of WebSocket payloads with their masking key, in pure Python; ``Masker`` is wsproto's own."""

from __future__ import annotations

from wsproto.frame_protocol import XorMaskerSimple as Masker

__all__ = ["Masker", "unmasked"]


def unmasked(data: bytes, begin: int, end: int, key: bytes, before: int) -> bytes:
    """``data[begin:end]`` without its mask; ``before`` bytes of the same payload came earlier."""
    if not 0 <= begin <= end <= len(data) or len(key) != 4 or before < 0:
        raise ValueError("the range is outside of the data, or the key does not have four bytes")
    size = end - begin
    repeated = (key * (size // 4 + 2))[before % 4 :][:size]
    return (int.from_bytes(data[begin:end]) ^ int.from_bytes(repeated)).to_bytes(size)
