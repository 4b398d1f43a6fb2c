"""The compiled twins of ``hypeman._native``, for tests that hold them against the Python ones."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def optional(name: str) -> Any:
    """The extension of this name; None if it is not built."""
    try:
        return import_module(f"hypeman._native.{name}")
    except ImportError:
        return None
