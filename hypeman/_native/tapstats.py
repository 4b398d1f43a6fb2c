"""Selects the compiled counter sweep or its Python twin.

``HYPEMAN_NATIVE=yes`` makes a missing build an error, ``no`` selects the twin; otherwise the compiled
one is used if it was built.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__all__ = ["NATIVE", "TapStats", "parse_stats"]

NATIVE = False
"""Whether the compiled sweep is in use."""

if TYPE_CHECKING or os.environ.get("HYPEMAN_NATIVE") == "no":
    from hypeman._native.tapstats_py import TapStats, parse_stats
else:
    try:
        from hypeman._native._tapstats_c import TapStats, parse_stats

        NATIVE = True
    except ImportError:
        if os.environ.get("HYPEMAN_NATIVE") == "yes":
            raise
        from hypeman._native.tapstats_py import TapStats, parse_stats
