"""What is kept about certificates by ACME. The store is readable by root only, and so are the keys in it."""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct
from msgspec.structs import replace

from hypeman.store import Table, Txn


class AccountRow(Struct, frozen=True):
    """An account at a CA. The key is written before the account is asked for: the same key gets the same account."""

    key: str
    """PEM."""
    url: str = ""
    """Empty until the CA has answered."""

    def __repr__(self) -> str:
        return f"AccountRow({self.url})"


class CertificateRow(Struct, frozen=True):
    """What a name has, and how far its next certificate is.

    ``order_key`` is written before the order is asked for, and ``order`` before anything is done with it: a server that
    is killed anywhere continues the order that it had. Each attempt counts as failed until it succeeds, so that one
    that is killed again and again does not order again and again.
    """

    chain: str = ""
    """PEM; empty until there is one."""
    key: str = ""
    not_after: datetime | None = None
    account: str = ""
    """Which account it is from."""
    order: str = ""
    """URL of the order in progress."""
    order_key: str = ""
    """PEM: the key of the certificate that is ordered."""
    order_account: str = ""
    failures: int = 0
    next_attempt: datetime | None = None
    error: str = ""

    def __repr__(self) -> str:
        return f"CertificateRow({self.order}, {self.failures} failures)"


ACCOUNTS: Table[AccountRow] = Table("acme_accounts", AccountRow)
CERTIFICATES: Table[CertificateRow] = Table("acme_certificates", CertificateRow)
"""By name."""


def change(txn: Txn, name: str, **fields: object) -> CertificateRow:
    """Change some fields of a row, which need not exist; the row then."""
    row = replace(txn.get(CERTIFICATES, name) or CertificateRow(), **fields)
    txn.put(CERTIFICATES, name, row)
    return row
