"""Schema version of the store, and how an older one becomes this one.

Adding a field with a default, or a table, needs nothing. Everything else raises SCHEMA_VERSION and
adds the function that turns the version before into it. The steps run in one transaction: either
the store is wholly of the new version or untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import msgspec

from hypeman.store.tables import Table, Txn

SCHEMA_VERSION = 1

Migration = Callable[[Txn], None]

MIGRATIONS: Mapping[int, Migration] = MappingProxyType({})
"""Version n → what turns a store of version n into n + 1."""


class SchemaRow(msgspec.Struct, frozen=True):
    version: int
    created_by: str
    """Version of the program that made the store."""


SCHEMA: Table[SchemaRow] = Table("schema", SchemaRow)
