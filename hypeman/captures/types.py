"""API types of captures: how saved memory is compressed."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta, Struct


class CompressionAlgorithm(enum.StrEnum):
    ZSTD = "zstd"
    LZ4 = "lz4"


class SnapshotCompressionConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How saved memory is compressed. The last two fields apply only while enabled."""

    enabled: bool
    algorithm: CompressionAlgorithm | None = None
    level: Annotated[
        Annotated[int, Meta(ge=0, le=19)] | None, Meta(description="zstd 1 to 19 (default 1), lz4 0 to 9 (default 0)")
    ] = None
