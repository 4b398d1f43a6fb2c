"""Names as parts of a URL's path, for the command line and for `hypeman node`. Pure."""

from __future__ import annotations

from urllib.parse import quote


def segment(text: str) -> str:
    """``text`` as one segment of a path, also ``.`` and ``..``, which a client would resolve."""
    return text.replace(".", "%2E") if text in (".", "..") else quote(text, safe=":@")
