"""The store's tables of the registry, written only by this package.

registry_manifests   repository@digest → a manifest, whose bytes are a blob
registry_tags        repository:tag → the manifest's digest
registry_blobs       repository@digest → the blob may be read in the repository
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from hypeman.store.tables import Table, Txn


class ManifestRow(msgspec.Struct, frozen=True):
    media_type: str
    size: int
    created_at: datetime
    blobs: tuple[str, ...] = ()
    """Digests of its config and layers."""
    manifests: tuple[str, ...] = ()
    """Digests of the manifests of an index."""
    subject: str = ""
    """Digest of the manifest that it refers to: it is listed among that one's referrers."""
    artifact_type: str = ""
    annotations: dict[str, str] = {}


class TagRow(msgspec.Struct, frozen=True):
    digest: str
    updated_at: datetime
    image: str = ""
    """Normalised name of the image that was made of it."""
    adopting: bool = False
    """Its image, if it is one, has still to be made: the tag is written first."""


class BlobRow(msgspec.Struct, frozen=True):
    size: int
    created_at: datetime


MANIFESTS = Table("registry_manifests", ManifestRow)
TAGS = Table("registry_tags", TagRow)
BLOBS = Table("registry_blobs", BlobRow)


def digests_in_use(txn: Txn) -> set[str]:
    """All blobs that the registry must keep."""
    found = {key.rpartition("@")[2] for key in (*txn.keys(MANIFESTS), *txn.keys(BLOBS))}
    for _, row in txn.scan(MANIFESTS):
        found.update(row.blobs)
    return found


def index_of(txn: Txn, name: str, digest: str) -> list[tuple[str, str]]:
    """Digests and media types of the index of which the image ``name`` with the manifest ``digest`` was made, and of
    all that is in it, the index last. Empty if it was not made of one, or something of it is not here."""
    for key, tag in txn.scan(TAGS):
        if tag.image != name:
            continue
        repository = key.rpartition(":")[0]
        index = txn.get(MANIFESTS, f"{repository}@{tag.digest}")
        if index is not None and digest in index.manifests:
            rows = [(child, txn.get(MANIFESTS, f"{repository}@{child}")) for child in index.manifests]
            found = [(child, row.media_type) for child, row in rows if row is not None and not row.manifests]
            if len(found) == len(rows):
                return [*found, (tag.digest, index.media_type)]
    return []


def forget_image(txn: Txn, name: str) -> None:
    """An image was deleted: so are the tags from which it was made."""
    for key, row in list(txn.scan(TAGS)):
        if row.image == name:
            txn.delete(TAGS, key)


def collect(txn: Txn, before: datetime) -> None:
    """Remove what nothing refers to and what is older than ``before``: manifests without a tag that are neither part of
    an index nor refer to a manifest that is there, then blobs that no manifest of their repository has."""
    manifests = dict(txn.scan(MANIFESTS))
    kept = {f"{key.rpartition(':')[0]}@{row.digest}" for key, row in txn.scan(TAGS)}
    kept |= {key for key, row in manifests.items() if row.created_at >= before}
    while True:
        children = {
            f"{key.rpartition('@')[0]}@{child}" for key in kept & manifests.keys() for child in manifests[key].manifests
        }
        referrers = {
            key for key, row in manifests.items() if row.subject and f"{key.rpartition('@')[0]}@{row.subject}" in kept
        }
        if children | referrers <= kept:
            break
        kept |= children | referrers
    for key in manifests.keys() - kept:
        txn.delete(MANIFESTS, key)
    wanted = {
        f"{key.rpartition('@')[0]}@{digest}" for key, row in manifests.items() if key in kept for digest in row.blobs
    }
    for key, blob in list(txn.scan(BLOBS)):
        if key not in wanted and blob.created_at < before:
            txn.delete(BLOBS, key)
