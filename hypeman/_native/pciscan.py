"""Selects the compiled PCI scan or its Python twin.

``HYPEMAN_NATIVE=yes`` makes a missing build an error, ``no`` selects the twin; otherwise the compiled
one is used if it was built.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypeman._native.pciscan_py import Row

__all__ = ["NATIVE", "Row", "Scanner"]

NATIVE = False
"""Whether the compiled scan is in use."""

if TYPE_CHECKING or os.environ.get("HYPEMAN_NATIVE") == "no":
    from hypeman._native.pciscan_py import Scanner
else:
    try:
        from hypeman._native._pciscan_c import Scanner

        NATIVE = True
    except ImportError:
        if os.environ.get("HYPEMAN_NATIVE") == "yes":
            raise
        from hypeman._native.pciscan_py import Scanner
