"""Images made to measure: layers out of entries, put together as OCI layouts and archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import zstandard

OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def entry(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    *,
    data: bytes = b"",
    mode: int = 0o644,
    link: str = "",
    mtime: float = 1_600_000_000,
    xattrs: dict[str, str] | None = None,
    **fields: Any,
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.mtime, info.size = kind, mode, link, mtime, len(data)
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def directory(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, tarfile.SYMTYPE, link=target, mode=0o777, **fields)


def hard_link(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, tarfile.LNKTYPE, link=target, **fields)


def tar(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, errors="surrogateescape") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


class ImageFiles:
    """The blobs of one image, and its manifest."""

    def __init__(
        self,
        layers: list[bytes],
        *,
        compression: str = "gzip",
        config: dict[str, Any] | None = None,
        architecture: str = "amd64",
        diff_ids: list[str] | None = None,
        media_type: str | None = None,
    ) -> None:
        self.blobs: dict[str, bytes] = {}
        self.layers = layers
        suffix = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}[compression]
        self.layer_descriptors: list[dict[str, Any]] = []
        for layer in layers:
            packed = pack(layer, compression)
            self.blobs[sha256(packed)] = packed
            self.layer_descriptors.append(
                {"mediaType": media_type or OCI_LAYER + suffix, "digest": sha256(packed), "size": len(packed)}
            )
        document = {
            "architecture": architecture, "os": "linux", "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [sha256(layer) for layer in layers]},
        }  # fmt: skip
        self.config = json.dumps(document).encode()
        self.blobs[sha256(self.config)] = self.config
        self.manifest_document = {
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, "digest": sha256(self.config), "size": len(self.config)},
            "layers": self.layer_descriptors,
        }  # fmt: skip

    @property
    def manifest(self) -> bytes:
        return json.dumps(self.manifest_document).encode()

    @property
    def digest(self) -> str:
        return sha256(self.manifest)

    def write_layout(self, path: Path, tag: str = "latest") -> Path:
        """An OCI layout directory."""
        blobs = path / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        manifest = self.manifest
        for digest, data in {**self.blobs, self.digest: manifest}.items():
            (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        index = {
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [{
                "mediaType": OCI_MANIFEST, "digest": self.digest, "size": len(manifest),
                "annotations": {"org.opencontainers.image.ref.name": tag},
            }],
        }  # fmt: skip
        (path / "index.json").write_text(json.dumps(index))
        return path

    def docker_archive(self, name: str) -> bytes:
        """What ``docker save`` of old wrote."""
        config = sha256(self.config).removeprefix("sha256:") + ".json"
        saved = [{"Config": config, "RepoTags": [name], "Layers": [f"{n}/layer.tar" for n in range(len(self.layers))]}]
        files = [entry(f"{n}/layer.tar", data=layer) for n, layer in enumerate(self.layers)]
        return tar(*files, entry(config, data=self.config), entry("manifest.json", data=json.dumps(saved).encode()))


def pack(layer: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(layer, 6, mtime=0)
    if compression == "zstd":
        return zstandard.compress(layer, 3)
    return layer


def archive_directory(path: Path) -> bytes:
    """An OCI layout as OCI archive."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return tar(*(entry(str(file.relative_to(path)), data=file.read_bytes()) for file in files))


async def in_pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
