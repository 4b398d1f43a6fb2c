"""The ledger in the store.

usage-open/<instance>           OpenRow: the current period, replaced at each sample
usage-blocks/<number>           Block: appended, dropped from the front only
usage-entries/<number>/<n>      Entry of that block
usage-head/head                 HeadRow: the range of blocks, and what the first one follows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from hypeman.metering.chain import GENESIS, Block, Entry, hash_of, make_block
from hypeman.store import Table, Txn


class OpenRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """The usage of one instance since the last block, and the counters that it was read from."""

    entry: Entry
    life: str = ""
    """The VMM that the counters are of; empty: none."""
    cpu_us: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    gone: bool = False
    """The instance was deleted; the row is until the next block."""

    def after(self, closed: OpenRow) -> OpenRow:
        """What this row has beyond ``closed``, which is an earlier state of it that is in a block."""
        usage = self.entry.usage - closed.entry.usage
        return msgspec.structs.replace(
            self, entry=msgspec.structs.replace(self.entry, begin=closed.entry.end, usage=usage)
        )


class HeadRow(msgspec.Struct, frozen=True, omit_defaults=True):
    first: int = 1
    last: int = 0
    """0: no block yet."""
    before_first: str = GENESIS
    hash: str = GENESIS
    """Of the last block."""
    rolled_until: int = 0
    """Blocks up to this number have been looked at for rolling up."""
    sampled: int = 0
    """Seconds since 1970; 0: never."""


OPEN: Table[OpenRow] = Table("usage-open", OpenRow)
BLOCKS: Table[Block] = Table("usage-blocks", Block)
ENTRIES: Table[Entry] = Table("usage-entries", Entry)
HEAD: Table[HeadRow] = Table("usage-head", HeadRow)
_KEY = "head"


def head(txn: Txn) -> HeadRow:
    return txn.get(HEAD, _KEY) or HeadRow()


def put_head(txn: Txn, row: HeadRow) -> None:
    txn.put(HEAD, _KEY, row)


def block(txn: Txn, number: int) -> Block | None:
    return txn.get(BLOCKS, _number(number))


def entries_of(txn: Txn, number: int) -> list[Entry]:
    return [entry for _, entry in txn.scan(ENTRIES, f"{_number(number)}/")]


def append(
    txn: Txn, kind: Literal["hour", "day"], entries: Sequence[Entry], *, first: int = 0, last: int = 0
) -> HeadRow:
    """Add a block of ``entries`` to the chain; none if there are none."""
    row = head(txn)
    if not entries:
        return row
    made = make_block(row.last + 1, row.hash, kind, entries, first=first, last=last)
    txn.put(BLOCKS, _number(made.number), made)
    for at, entry in enumerate(entries):
        txn.put(ENTRIES, f"{_number(made.number)}/{at:08}", entry)
    row = msgspec.structs.replace(row, last=made.number, hash=hash_of(made))
    put_head(txn, row)
    return row


def drop_entries(txn: Txn, number: int) -> None:
    for key in list(txn.keys(ENTRIES, f"{_number(number)}/")):
        txn.delete(ENTRIES, key)


def drop_first(txn: Txn) -> None:
    """Remove the oldest block; the chain then begins with the next one."""
    row = head(txn)
    oldest = block(txn, row.first)
    assert oldest is not None, "the range has a block for each number"
    drop_entries(txn, row.first)
    txn.delete(BLOCKS, _number(row.first))
    put_head(txn, msgspec.structs.replace(row, first=row.first + 1, before_first=hash_of(oldest)))


def _number(number: int) -> str:
    return f"{number:012}"
