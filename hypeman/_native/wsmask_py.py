"""XOR of WebSocket payloads with their masking key, in pure Python: wsproto's own, four table look-ups per part."""

from __future__ import annotations

from wsproto.frame_protocol import XorMaskerSimple as Masker

__all__ = ["Masker"]
