"""The ledger's data, and what makes it tamper-evident. Pure.

    Usage    sums of what was used, whole numbers so that they add up exactly
    Entry    the usage of one instance in one period
    Block    one period of all instances: the sums, the hash of its entries, the hash of the block before

A block's hash covers everything in it, so that anyone who knows the hash of a block can tell that no earlier one, and
none of their entries, was changed, removed or inserted. A day's block takes the place of the entries of its hours'
blocks; the hours' blocks stay in the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from hypeman.ids import Tags

GENESIS = "0" * 64
"""In place of the hash of the block before the first."""

_encode = msgspec.json.Encoder(order="sorted").encode


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was used."""

    cpu_us: int = 0
    """Microseconds of CPU time of the VMM and its guest."""
    memory_byte_seconds: int = 0
    disk_byte_seconds: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu_us + other.cpu_us,
            self.memory_byte_seconds + other.memory_byte_seconds,
            self.disk_byte_seconds + other.disk_byte_seconds,
            self.rx_bytes + other.rx_bytes,
            self.tx_bytes + other.tx_bytes,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu_us - other.cpu_us,
            self.memory_byte_seconds - other.memory_byte_seconds,
            self.disk_byte_seconds - other.disk_byte_seconds,
            self.rx_bytes - other.rx_bytes,
            self.tx_bytes - other.tx_bytes,
        )


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    instance: str
    name: str
    begin: int
    """Seconds since 1970."""
    end: int
    usage: Usage
    tags: Tags = {}


class Block(msgspec.Struct, frozen=True, omit_defaults=True):
    number: int
    """From 1, without gaps."""
    before: str
    """Hash of the block before."""
    kind: Literal["hour", "day"]
    begin: int
    end: int
    entries: int
    entries_hash: str
    total: Usage
    first: int = 0
    """Of a day: the number of its first hour's block; ``last`` is that of its last."""
    last: int = 0


def hash_of(row: Block) -> str:
    return hashlib.sha256(_encode(row)).hexdigest()


def hash_entries(entries: Iterable[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(_encode(entry) + b"\n")
    return digest.hexdigest()


def make_block(
    number: int, before: str, kind: Literal["hour", "day"], entries: Sequence[Entry], *, first: int = 0, last: int = 0
) -> Block:
    """The block of ``entries``, of which there is at least one."""
    return Block(
        number=number,
        before=before,
        kind=kind,
        begin=min(entry.begin for entry in entries),
        end=max(entry.end for entry in entries),
        entries=len(entries),
        entries_hash=hash_entries(entries),
        total=sum((entry.usage for entry in entries), Usage()),
        first=first,
        last=last,
    )


def find_fault(block: Block, number: int, before: str, entries: Sequence[Entry] | None) -> str:
    """What is wrong with a block that follows the one with the hash ``before``; empty if nothing is.

    ``entries`` are None if a day's block has taken their place.
    """
    if block.number != number or block.before != before:
        return "it does not follow the block before it"
    if entries is None:
        return ""
    if len(entries) != block.entries or hash_entries(entries) != block.entries_hash:
        return "its entries are not those that were written"
    return ""


def merge_entries(entries: Iterable[Entry]) -> list[Entry]:
    """One entry for each instance and its tags, in the order of the first."""
    merged: dict[tuple[str, tuple[tuple[str, str], ...]], Entry] = {}
    for entry in entries:
        key = (entry.instance, tuple(sorted(entry.tags.items())))
        known = merged.get(key)
        if known is None:
            merged[key] = entry
            continue
        merged[key] = Entry(
            instance=entry.instance,
            name=entry.name,
            begin=min(known.begin, entry.begin),
            end=max(known.end, entry.end),
            usage=known.usage + entry.usage,
            tags=entry.tags,
        )
    return list(merged.values())
