"""The cache of blobs: eviction beside those who use it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hypeman.images.blobs import Blobs
from hypeman.images.manifest import digest_of


def test_eviction_makes_nobody_wait_while_space_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop claims blobs; freeing the space of a large file takes seconds on some file systems."""
    blobs = Blobs(tmp_path)
    blobs.prepare()
    old, used, new = (bytes([number]) * 100 for number in range(3))
    for age, data in enumerate((old, used, new)):
        blobs.add(data, digest_of(data))
        os.utime(blobs.path(digest_of(data)), ns=(age, age))
    claimed, unlink = list[bool](), Path.unlink

    def claim_another() -> None:
        with blobs.claim(digest_of(b"another")):
            pass

    def watched(path: Path, missing_ok: bool = False) -> None:
        thread = threading.Thread(target=claim_another, daemon=True)
        thread.start()
        thread.join(5)
        claimed.append(not thread.is_alive())
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    blobs.begin_trim()
    with blobs.claim(digest_of(used)):
        assert blobs.trim(150, keep=()) == 200, "the old one, and the new one: the used one stays"
    assert claimed == [True, True]
    assert os.listdir(tmp_path / "sha256") == [digest_of(used).removeprefix("sha256:")]
    assert os.listdir(tmp_path / "partial") == []


def test_an_eviction_that_was_killed_is_finished(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.prepare()
    (tmp_path / "partial" / "evicted-0123456789abcdef").write_bytes(b"x")
    blobs.prepare()
    assert os.listdir(tmp_path / "partial") == []
