"""Pure: one record for each request, as an engine encodes them (``ext/egress/audit.c``) and the server reads them.

Layout, little-endian: u16 size of all; u8 kind; u8 rules applied; u16 status; u8 reason; u8 HTTP major version;
u8 decision; u16 port; u32 µs taken; i64 µs since 1970; u64 bytes up; u64 bytes down; then instance, host, method, names
of credentials, rule and target, each as u8 length and text. In a record of an ingress the last three are its id, client
and path.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec

_FIXED = struct.Struct("<HBBHBBBHIqQQ")
_KINDS = ("request", "passed_through", "refused", "ingress", "ingress_passed_through")
_CLIENT_LEFT = 499
_DECISIONS = ("", "allowed", "denied", "observed", "approved", "held")
_YEAR_10000 = 253_402_300_800_000_000
"""µs since 1970; no clock shows it, and no date can be made of it."""


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request, allowed or denied; without credential values."""

    time: float
    """Seconds since 1970, when it ended."""
    instance: str
    kind: str
    """``request``; ``passed_through``: not decrypted; ``refused``: a connection without a valid request."""
    host: str
    port: int
    method: str
    status: int
    reason: str
    """``ok``, or the error code returned to a denied client."""
    injected: bool
    credentials: tuple[str, ...]
    """Names of the credentials that were applied."""
    bytes_up: int
    bytes_down: int
    seconds: float
    http: int
    decision: str = ""
    """What the instance's rules said: ``allowed``, ``denied``, ``observed`` (would be denied), ``approved`` or ``held``
    (not approved); empty if it has none."""
    rule: str = ""
    """Name of the rule that decided, or ``default``."""
    target: str = ""
    """Path, and query, if the rule has them recorded; at most 239 characters."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One request by an ingress that is done, or one connection that was passed through."""

    ingress: str
    """Id; empty if no rule fits."""
    host: str
    client: str
    method: str
    path: str
    """Without the query, shortened."""
    instance: str
    status: int
    """Of the response; 499 if the client left before one. Passed through: 0, or why it could not be."""
    received: int
    """Bytes of the body."""
    sent: int
    seconds: float
    http: int
    """Major version that the client used."""
    passed: bool = False
    """TLS was passed through: there is no request, and bytes are those of the connection."""


def read_records(data: bytes | bytearray, reasons: Sequence[str]) -> Iterator[AuditRecord | Served]:
    """Raises ValueError for anything but whole records."""
    at = 0
    while at < len(data):
        if at + _FIXED.size > len(data):
            raise ValueError("an audit record is cut short")
        size, kind, rules, status, reason, http, decided, port, took, when, up, down = _FIXED.unpack_from(data, at)
        texts, place, end = [], at + _FIXED.size, at + size
        for _ in range(6):
            length = data[place] if place < len(data) else 0
            texts.append(bytes(data[place + 1 : place + 1 + length]).decode("ascii", "replace"))
            place += 1 + length
        if (
            place != end
            or end > len(data)
            or kind >= len(_KINDS)
            or reason >= len(reasons)
            or decided >= len(_DECISIONS)
            or not 0 <= when < _YEAR_10000
        ):
            raise ValueError("not an audit record")
        at = end
        passed = _KINDS[kind] == "ingress_passed_through"
        if passed or _KINDS[kind] == "ingress":
            instance, host, method, ingress, client, path = texts
            yield Served(
                ingress=ingress,
                host=host,
                client=client,
                method=method,
                path=path,
                instance=instance,
                status=status or (_CLIENT_LEFT if reasons[reason] == "client_closed" and not passed else 0),
                received=up,
                sent=down,
                seconds=took / 1e6,
                http=http,
                passed=passed,
            )
            continue
        instance, host, method, keys, rule, target = texts
        yield AuditRecord(
            time=when / 1e6,
            instance=instance,
            kind=_KINDS[kind],
            host=host,
            port=port,
            method=method,
            status=status,
            reason=reasons[reason],
            injected=rules > 0,
            credentials=tuple(keys.split(",")) if keys else (),
            bytes_up=up,
            bytes_down=down,
            seconds=took / 1e6,
            http=http,
            decision=_DECISIONS[decided],
            rule=rule,
            target=target,
        )
