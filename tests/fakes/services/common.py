"""What several fakes use."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

Tags = Mapping[str, str]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DIGEST = "sha256:" + "ab" * 32


def normalized(ref: str) -> str:
    """As much of Docker's rules as the tests need."""
    ref = ref if ref.rpartition("/")[2].count(":") else ref + ":latest"
    if "/" not in ref:
        ref = "library/" + ref
    return ref if "." in ref.split("/")[0] else "docker.io/" + ref
