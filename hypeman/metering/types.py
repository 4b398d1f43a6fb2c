"""Usage in the API. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.fields import Timestamp
from hypeman.metering.chain import Entry


class UsageBy(enum.StrEnum):
    """What one row of a report is about."""

    INSTANCE = "instance"
    TAG = "tag"
    DAY = "day"


class Query(Struct, frozen=True, kw_only=True):
    """What a report is about; times are seconds since 1970."""

    since: float = 0.0
    until: float = float("inf")
    instance: str = ""
    """Id, or a name that it had."""
    tags: Mapping[str, str] = {}
    by: UsageBy = UsageBy.INSTANCE
    tag: str = ""

    def wants(self, entry: Entry) -> bool:
        return (
            self.since <= entry.begin < self.until
            and self.instance in ("", entry.instance, entry.name)
            and all(entry.tags.get(key) == value for key, value in self.tags.items())
        )


class UsageRow(Struct, frozen=True, kw_only=True):
    """What was used. 1 GB is 2³⁰ bytes."""

    instance_id: str | UnsetType = UNSET
    instance_name: Annotated[str | UnsetType, Meta(description="The newest, if it was renamed")] = UNSET
    value: Annotated[str | UnsetType, Meta(description="Of the tag; empty: instances without it")] = UNSET
    day: Annotated[str | UnsetType, Meta(examples=["2026-01-02"], description="UTC")] = UNSET
    begin: Annotated[Timestamp | None, Meta(description="null: nothing was used")]
    end: Timestamp | None
    cpu_seconds: Annotated[float, Meta(description="CPU time of the VMM and its guest")]
    memory_gb_hours: Annotated[float, Meta(description="Allocated while there was a VMM")]
    disk_gb_hours: Annotated[float, Meta(description="Allocated by the instance; volumes apart")]
    network_rx_bytes: Annotated[int, Meta(description="Received by the guest")]
    network_tx_bytes: int


class UsageReport(Struct, frozen=True, kw_only=True):
    by: UsageBy
    rows: tuple[UsageRow, ...]
    total: UsageRow


class UsageVerification(Struct, frozen=True, kw_only=True):
    """Whether the ledger is as it was written."""

    valid: bool
    first: Annotated[int, Meta(description="Number of the oldest block that is kept; last + 1 if there is none")]
    last: int
    hash: Annotated[
        str, Meta(description="Of the last block. Who notes it can show later that nothing before it was changed")
    ]
    entries: Annotated[int, Meta(description="That were checked")]
    fault: Annotated[str | UnsetType, Meta(description="What is wrong; absent if nothing is")] = UNSET
    block: Annotated[int | UnsetType, Meta(description="Where")] = UNSET
