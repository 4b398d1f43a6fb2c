"""Coverage-guided fuzzing of everything that reads an image's bytes, with atheris.

    python -m tests.fuzz.images_layers -max_total_time=60 [corpus]       tar, layers, EROFS writer
    python -m tests.fuzz.images_layers --manifest -max_total_time=60     manifests, indexes, configs

Whatever comes in, either a disk comes out that begins as one should, or a TarError (ManifestError)
with a reason; never another exception, never more time or memory than the input's length allows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

import atheris

with atheris.instrument_imports(include=["hypeman.images"]):
    from hypeman.images.erofs import check_super_block
    from hypeman.images.manifest import (
        Index,
        ManifestError,
        choose_platform,
        parse_config,
        parse_manifest,
    )
    from hypeman.images.reference import Platform
    from hypeman.images.tar import TarError
    from hypeman.images.unpack import unpack
    from tests.images.trees import make_disk

from tests.images.layout import OCI_INDEX, OCI_MANIFEST, ImageFiles, directory, entry, hard_link, symlink, tar

SEEDS = (
    tar(directory("a"), entry("a/b", data=b"x" * 600), hard_link("c", "a/b"), symlink("d", "a"), entry("d/.wh.b")),
    tar(entry("x" * 120, data=b"1", xattrs={"user.x": "y"}), entry("a/.wh..wh..opq")),
)
_IMAGE = ImageFiles([])
_POINTER = {"mediaType": OCI_MANIFEST, "digest": _IMAGE.digest, "size": 5, "platform": {"os": "linux"}}
DOCUMENTS = (
    _IMAGE.manifest,
    _IMAGE.config,
    json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [_POINTER]}).encode(),
)
_LIMIT = 1 << 20


def layers(data: bytes) -> None:
    """The first bytes say whether a compressed stream follows, or changes to a good archive."""
    if len(data) < 4:
        return
    try:
        if data[0] % 3 == 0 and data[1] % 2:
            plain = _damaged(SEEDS[data[2] % len(SEEDS)], data[3:])
        else:
            blob = iter([data[2:]])
            plain = b"".join(_bounded(unpack(lambda size: next(blob, b""))))
        disk = make_disk([plain, SEEDS[0]], max_bytes=_LIMIT, max_entries=200)
    except TarError as error:
        assert str(error)
        return
    check_super_block(disk[:4096], len(disk))


def _bounded(chunks: Iterable[bytes]) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > _LIMIT:
            raise TarError("too long")
        yield chunk


def _damaged(good: bytes, edits: bytes) -> bytes:
    """``good`` with some bytes changed: two bytes of ``edits`` say where, the third to what."""
    changed = bytearray(good)
    for at in range(0, len(edits) - 2, 3):
        changed[int.from_bytes(edits[at : at + 2], "big") % len(good)] = edits[at + 2]
    return bytes(changed)


def manifests(data: bytes) -> None:
    if len(data) > 3 and data[0] % 2:
        data = _damaged(DOCUMENTS[data[1] % len(DOCUMENTS)], data[2:])
    try:
        document = parse_manifest(data)
        if isinstance(document, Index):
            choose_platform(document, Platform("linux", "amd64"))
        else:
            parse_config(data, document)
    except ManifestError as error:
        assert str(error)


if __name__ == "__main__":
    target = manifests if "--manifest" in sys.argv else layers
    atheris.Setup([argument for argument in sys.argv if argument != "--manifest"], target)
    atheris.Fuzz()
