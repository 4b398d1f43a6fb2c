"""Typed tables in one ordered key space.

A row is stored under ``<table>/<key>`` as a Struct in JSON: a dump of the store is human-readable,
and a field added with a default needs no migration (msgspec's schema evolution). All tables share
one key space, so that every transaction covers all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import lmdb
import msgspec

from hypeman.actor import Actor
from hypeman.errors import StoreError

T = TypeVar("T")

_MAX_KEY = 511
"""LMDB's key size limit in bytes."""


class Table(Generic[T]):
    """Name and row type of a table. Declared once at module level by the package that owns it."""

    def __init__(self, name: str, row: type[T]) -> None:
        if "/" in name or not name:
            raise ValueError(f"table name {name!r}")
        self.name = name
        self.prefix = name.encode() + b"/"
        self.encode = msgspec.json.Encoder().encode
        self.decode: Callable[[bytes | memoryview], T] = msgspec.json.Decoder(row).decode

    def __repr__(self) -> str:
        return f"Table({self.name!r})"

    def key(self, key: str) -> bytes:
        """The full key of a row. Raises StoreError if it is longer than LMDB allows."""
        full = self.prefix + key.encode()
        if len(full) > _MAX_KEY:
            raise StoreError(f"key {key[:60]!r}… of table {self.name} is longer than {_MAX_KEY} bytes")
        return full


class Txn:
    """One transaction. Valid only inside the function that was given it; never keep it."""

    def __init__(self, txn: lmdb.Transaction, actor: Actor | None = None) -> None:
        self._txn = txn
        self.actor = actor
        """Who requested this write; None if the server acts on its own."""

    def get(self, table: Table[T], key: str) -> T | None:
        value = self._txn.get(table.key(key))
        return None if value is None else table.decode(value)

    def exists(self, table: Table[T], key: str) -> bool:
        return self._txn.get(table.key(key)) is not None

    def put(self, table: Table[T], key: str, row: T) -> None:
        """Write ``row``, replacing any existing one."""
        self._txn.put(table.key(key), table.encode(row))

    def insert(self, table: Table[T], key: str, row: T) -> bool:
        """Write ``row`` only if there is none yet; returns whether it was written."""
        return bool(self._txn.put(table.key(key), table.encode(row), overwrite=False))

    def delete(self, table: Table[T], key: str) -> bool:
        """Remove the row; returns whether there was one."""
        return bool(self._txn.delete(table.key(key)))

    def scan(self, table: Table[T], prefix: str = "") -> Iterator[tuple[str, T]]:
        """Rows whose key starts with ``prefix``, in key order. Do not change the table during the
        iteration: collect the rows first."""
        for key, value in self._items(table, prefix):
            yield key, table.decode(value)

    def keys(self, table: Table[T], prefix: str = "") -> Iterator[str]:
        """Keys that start with ``prefix``, in order, without reading the rows."""
        for key, _ in self._items(table, prefix):
            yield key

    def _items(self, table: Table[T], prefix: str) -> Iterator[tuple[str, bytes]]:
        start = table.key(prefix)
        skip = len(table.prefix)
        with self._txn.cursor() as cursor:
            if not cursor.set_range(start):
                return
            for key, value in cursor:
                assert isinstance(key, bytes) and isinstance(value, bytes)  # not buffers
                if not key.startswith(start):
                    return
                yield key[skip:].decode(), value
