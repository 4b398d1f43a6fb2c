"""The bundle's file: a tar whose every byte follows from a signed list of contents.

    manifest.json            what is in it, with sizes and SHA-256
    manifest.json.minisig    minisign's signature of the manifest
    …                        the files, in the manifest's order
    zeros                    the tar's end

The reader does not interpret a tar: it knows each header and each byte of padding from the manifest and compares.
So nothing is read in two ways, and a single changed byte anywhere is refused. Ordinary tools read the file, too:

    tar -xf FILE manifest.json manifest.json.minisig && minisign -V -p KEY.pub -m manifest.json

Nothing is written before the signature, and every file's digest, have been checked; a file is hashed again while it is
written, in case it changed in between.
"""

from __future__ import annotations

import enum
import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta

from hypeman.bundle.minisign import MAX_TEXT, BadSignature, PublicKey, SecretKey, sign, untrusted_comment, verify
from hypeman.errors import HypemanError, InvalidRequest

FORMAT = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.minisig"
MAX_MANIFEST = 1 << 20
MAX_FILES = 1000
MAX_SIZE = 1 << 40
_BLOCK = 512
_CHUNK = 1 << 20
_OCTAL = re.compile(rb"[0-7]{11}\0")


class BadBundle(HypemanError):
    """The file is damaged, was altered, or is not a bundle."""


class Kind(enum.StrEnum):
    APPLIANCE = "appliance"
    """The release's ``hypeman-VERSION-linux-ARCH.tar.gz``; exactly one."""
    VMM = "vmm"
    """A static VMM program."""
    PACKAGE = "package"
    """A Debian package that the host needs, as QEMU."""
    IMAGE = "image"
    """An OCI or Docker archive; ``reference`` is the image's name."""
    CONFIG = "config"
    """A drop-in for the configuration."""
    COMPOSE = "compose"
    """Instances to create, as for ``hypeman compose up``."""


Name = Annotated[str, Meta(pattern=r"^[a-z]+/[A-Za-z0-9_][A-Za-z0-9._+~-]{0,90}$")]


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    """``kind/file``: also the path in the tar."""
    kind: Kind
    size: Annotated[int, Meta(ge=0, le=MAX_SIZE)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    reference: Annotated[str, Meta(max_length=300)] = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    name: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9._-]{0,62}$")]
    version: Annotated[str, Meta(pattern="^[0-9A-Za-z.+~-]{1,40}$")]
    """Of the appliance."""
    architecture: Annotated[str, Meta(pattern="^[a-z0-9]{1,20}$")]
    created_at: datetime
    files: Annotated[tuple[File, ...], Meta(min_length=1, max_length=MAX_FILES)]

    def of(self, kind: Kind) -> tuple[File, ...]:
        return tuple(file for file in self.files if file.kind is kind)


class Verified(msgspec.Struct, frozen=True):
    """A manifest with a valid signature."""

    manifest: Manifest
    digest: str
    """SHA-256 of the manifest, which stands for the whole bundle."""
    key: PublicKey
    comment: str


Sink = Callable[[bytes], object]


def describe(path: Path, kind: Kind, name: str = "", *, reference: str = "") -> File:
    """The manifest's entry of a local file. Raises OSError; InvalidRequest if its name cannot be in a bundle."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            size += len(data)
    try:
        return msgspec.convert(
            {
                "name": f"{kind.value}/{name or path.name}",
                "kind": kind.value,
                "size": size,
                "sha256": digest.hexdigest(),
                "reference": reference,
            },
            File,
        )
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{path.name} cannot be in a bundle: {error}") from None


def check(manifest: Manifest) -> None:
    """Raise BadBundle for an inconsistent manifest."""
    names = [file.name for file in manifest.files]
    for wrong, message in (
        (manifest.format != FORMAT, f"has format {manifest.format}; this program reads {FORMAT}"),
        (len(set(names)) < len(names), "has two files with the same name"),
        (len(manifest.of(Kind.APPLIANCE)) != 1, "must have exactly one appliance"),
        (len(manifest.of(Kind.COMPOSE)) > 1, "has more than one compose file"),
        (
            any(not file.name.startswith(f"{file.kind.value}/") for file in manifest.files),
            "has a file whose name does not match its kind",
        ),
        (
            any(bool(file.reference) != (file.kind is Kind.IMAGE) for file in manifest.files),
            "has an image without a name",
        ),
    ):
        if wrong:
            raise BadBundle(f"the bundle {message}")


def write(target: BinaryIO, manifest: Manifest, sources: Sequence[Path], key: SecretKey) -> None:
    """Write a bundle. ``sources`` are the manifest's files, in order. Raises BadBundle if one has changed since."""
    check(manifest)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    if len(text) > MAX_MANIFEST:
        raise InvalidRequest(f"the bundle's list of contents is larger than {MAX_MANIFEST} bytes")
    comment = f"hypeman bundle {manifest.name} {manifest.version} {manifest.architecture}"
    for name, data in ((MANIFEST, text), (SIGNATURE, sign(text, key, comment=comment))):
        target.write(_header(name, len(data)) + data + _padding(len(data)))
    for file, source in zip(manifest.files, sources, strict=True):
        target.write(_header(file.name, file.size))
        digest = hashlib.sha256()
        left = file.size
        with source.open("rb") as content:
            while left and (data := content.read(min(left, _CHUNK))):
                digest.update(data)
                target.write(data)
                left -= len(data)
        if left or digest.hexdigest() != file.sha256:
            raise BadBundle(f"{source} changed while it was read")
        target.write(_padding(file.size))
    target.write(bytes(2 * _BLOCK))


def read_manifest(source: BinaryIO, trusted: Iterable[PublicKey]) -> Verified:
    """The signed list of contents at the bundle's start. Raises BadBundle, BadSignature."""
    text = _first(source, MANIFEST, MAX_MANIFEST)
    signature = _first(source, SIGNATURE, MAX_TEXT)
    key, comment = verify(text, signature, tuple(trusted))
    if signature.partition(b"\n")[0] != untrusted_comment(key):  # the one line that no signature covers
        raise BadBundle(f"the bundle was altered at {SIGNATURE}")
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except msgspec.DecodeError as error:
        raise BadBundle(f"the bundle's list of contents is invalid: {error}") from None
    check(manifest)
    return Verified(manifest, hashlib.sha256(text).hexdigest(), key, comment)


def read_files(source: BinaryIO, manifest: Manifest, sink: Callable[[File], Sink]) -> None:
    """Check everything behind the signature. ``sink`` gives, for each file, what receives its bytes.

    Raises BadBundle. What the sinks received counts only once this has returned.
    """
    for file in manifest.files:
        _expect(source, _header(file.name, file.size), file.name)
        digest = hashlib.sha256()
        receive = sink(file)
        left = file.size
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise BadBundle(f"the bundle is cut off in {file.name}")
            digest.update(data)
            receive(data)
            left -= len(data)
        if digest.hexdigest() != file.sha256:
            raise BadBundle(f"{file.name} in the bundle is not the one that was signed")
        _expect(source, _padding(file.size), file.name)
    _expect(source, bytes(2 * _BLOCK), "its end")
    if source.read(1):
        raise BadBundle("there is data after the end of the bundle")


def check_file(path: Path, trusted: Iterable[PublicKey]) -> Verified:
    """Read a whole bundle and write nothing. Raises BadBundle, BadSignature, OSError."""
    with path.open("rb") as source:
        verified = read_manifest(source, trusted)
        read_files(source, verified.manifest, lambda file: lambda data: None)
    return verified


def _first(source: BinaryIO, name: str, limit: int) -> bytes:
    """One of the two files whose size is not known yet."""
    header = _exactly(source, _BLOCK)
    if not _OCTAL.fullmatch(header[124:136]):
        raise BadBundle("this is not a hypeman bundle")
    size = int(header[124:135], 8)
    if header != _header(name, size):
        raise BadBundle("this is not a hypeman bundle")
    if not 0 < size <= limit:
        raise BadBundle(f"{name} in the bundle has {size} bytes; at most {limit} are allowed")
    data = _exactly(source, size)
    _expect(source, _padding(size), name)
    return data


def _exactly(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise BadBundle("the bundle is cut off")
    return data


def _expect(source: BinaryIO, expected: bytes, where: str) -> None:
    found = source.read(len(expected))
    if found != expected:
        how = "is cut off" if len(found) < len(expected) else "was altered"
        raise BadBundle(f"the bundle {how} at {where}")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


__all__ = ["BadBundle", "BadSignature", "File", "Kind", "Manifest", "Verified"]
