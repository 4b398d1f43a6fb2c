"""The store's tables of builds, written only by this package.

    builders/<id>   BuilderRow
    builds/<id>     BuildRow: the build as the API shows it, and what is to be built

A build's context and journal are files in ``data_dir/builds/<id>``, published before the row is written.
"""

from __future__ import annotations

import msgspec

from hypeman import events
from hypeman.builds.request import BuildSpec
from hypeman.builds.types import Build, Builder, BuilderStatus
from hypeman.errors import NotFound
from hypeman.events.types import Datum
from hypeman.store.tables import Table, Txn

KEPT = 200
"""Finished builds that are kept."""


class BuilderRow(msgspec.Struct, frozen=True):
    builder: Builder
    """Without what is known from the builds: its queue and the active build."""


class BuildRow(msgspec.Struct, frozen=True):
    build: Build
    spec: BuildSpec
    borrowed: bool = False
    """It has secrets or logins of its caller, which are in the memory of the server that accepted it."""
    attempts: int = 0
    """How often it was started."""
    source_hash: str = ""


BUILDERS = Table("builders", BuilderRow)
BUILDS = Table("builds", BuildRow)


def all_builds(txn: Txn) -> list[BuildRow]:
    """Oldest first."""
    return sorted((row for _, row in txn.scan(BUILDS)), key=lambda row: (row.build.created_at, row.build.id))


def find_builder(txn: Txn, builder_id: str) -> Builder:
    """Raises NotFound."""
    row = txn.get(BUILDERS, builder_id) if 0 < len(builder_id.encode()) <= 256 else None
    if row is None:
        raise NotFound(f"there is no builder {builder_id[:80]!r}")
    return row.builder


def find_build(txn: Txn, build_id: str) -> BuildRow:
    """Raises NotFound."""
    row = txn.get(BUILDS, build_id) if 0 < len(build_id.encode()) <= 256 else None
    if row is None:
        raise NotFound(f"there is no build {build_id[:80]!r}")
    return row


def put_builder(txn: Txn, builder: Builder) -> None:
    txn.put(BUILDERS, builder.id, BuilderRow(builder))


def set_builder_status(txn: Txn, builder_id: str, status: BuilderStatus) -> None:
    """A no-op if it is gone."""
    row = txn.get(BUILDERS, builder_id)
    if row is not None:
        put_builder(txn, msgspec.structs.replace(row.builder, status=status))


def note_build(txn: Txn, build: Build, action: str) -> None:
    data: dict[str, Datum] = {
        "image": build.image_ref,
        "digest": build.image_digest,
        "error": build.error,
        "builder": build.builder_id,
    }
    events.record(txn, events.Kind.BUILD, action, build.id, tags=build.tags or None, data=data)


def note_builder(txn: Txn, builder: Builder, action: str) -> None:
    name, tags = builder.name or None, builder.tags or None
    events.record(txn, events.Kind.BUILDER, action, builder.id, name=name, tags=tags)


def trim(txn: Txn) -> list[str]:
    """Remove the oldest finished builds beyond those kept; returns their ids."""
    finished = [row.build.id for row in all_builds(txn) if row.build.status.is_final]
    gone = finished[:-KEPT]
    for build_id in gone:
        txn.delete(BUILDS, build_id)
    return gone
