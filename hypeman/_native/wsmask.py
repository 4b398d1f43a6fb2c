"""Selects the compiled masking of WebSocket payloads or its Python twin, and has wsproto use it.

``HYPEMAN_NATIVE=yes`` makes a missing build an error, ``no`` selects the twin; otherwise the compiled
one is used if it was built.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wsproto import frame_protocol

__all__ = ["NATIVE", "Masker", "install", "unmasked"]

NATIVE = False
"""Whether the compiled masking is in use."""

if TYPE_CHECKING or os.environ.get("HYPEMAN_NATIVE") == "no":
    from hypeman._native.wsmask_py import Masker, unmasked
else:
    try:
        from hypeman._native._wsmask_c import Masker, unmasked

        NATIVE = True
    except ImportError:
        if os.environ.get("HYPEMAN_NATIVE") == "yes":
            raise
        from hypeman._native.wsmask_py import Masker, unmasked


def install() -> None:
    """Let wsproto mask and unmask with ``Masker``, for the WebSockets that Hypercorn carries."""
    setattr(frame_protocol, "XorMaskerSimple", Masker)  # noqa: B010  (mypy: a class is not assignable)
