"""Schema version of the store, and migrations from older ones.

Adding a field with a default, or a table, needs no migration. Any other change increments SCHEMA_VERSION
and adds a function that migrates from the previous version. All migrations run in one transaction: the
store either has the new version or is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import msgspec

from hypeman.store.tables import Table, Txn

SCHEMA_VERSION = 1

Migration = Callable[[Txn], None]

MIGRATIONS: Mapping[int, Migration] = MappingProxyType({})
"""Version n → function that migrates a store from version n to n + 1."""


class SchemaRow(msgspec.Struct, frozen=True):
    version: int
    created_by: str
    """Version of the program that created the store."""


SCHEMA: Table[SchemaRow] = Table("schema", SchemaRow)
