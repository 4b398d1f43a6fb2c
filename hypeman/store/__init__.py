"""Persistent state: typed tables in one LMDB file. See README.md."""

from hypeman.store.schema import MIGRATIONS, SCHEMA_VERSION
from hypeman.store.store import Store
from hypeman.store.tables import Table, Txn

__all__ = ["MIGRATIONS", "SCHEMA_VERSION", "Store", "Table", "Txn"]
