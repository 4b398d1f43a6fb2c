"""Fixtures of other areas that the walls are tried with."""

from __future__ import annotations

from tests.images.conftest import make_images, registry

__all__ = ["make_images", "registry"]
