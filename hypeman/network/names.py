"""Names in the guests' network, as DNS messages. Pure.

    <instance>.<domain>, <instance>     a running instance, for itself and those guests that may reach it
    <service>.<domain>, <service>       the running instance of that service of the asker's own stack, likewise
    gateway.<domain>, host.<domain>     the gateway's address, where the host answers; also the host's own name
    addresses of the guests' network    back to those names

All other names are the business of the upstream server (``answer`` returns None). What a guest may not reach does not
exist for it.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from typing import Protocol

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset
import msgspec
from dns.rdtypes.ANY.PTR import PTR
from dns.rdtypes.ANY.SOA import SOA
from dns.rdtypes.IN.A import A

from hypeman.network.addressing import Subnet
from hypeman.network.types import Lease

TTL = 5
"""Seconds; an address passes to another instance much later than its instance is deleted."""
MAX_UDP = 512
"""Answers of ours are shorter."""
_HOST_NAMES = ("gateway", "host")
_HEADER = struct.Struct(">HHHHHH")
_REVERSE = dns.name.from_text("in-addr.arpa.")


class Directory(Protocol):
    """The running instances."""

    def by_name(self, name: str) -> Lease | None: ...
    def of_stack(self, asker: str, service: str) -> Lease | None:
        """The instance of ``service`` in the stack of the instance with the address ``asker``."""
        ...

    def by_address(self, address: str) -> tuple[str, Lease] | None:
        """Name and lease of the instance with this address."""
        ...


class Zone(msgspec.Struct, frozen=True):
    """What is answered here."""

    domain: dns.name.Name
    subnet: Subnet
    host_names: frozenset[str]
    """Names of the host, in lower case."""

    @classmethod
    def parse(cls, domain: str, subnet: Subnet, host_name: str) -> Zone:
        """Raises ValueError for a domain that is none."""
        try:
            name = dns.name.from_text(domain.lower())
        except (dns.exception.DNSException, UnicodeError) as error:
            raise ValueError(f"domain {domain!r}: {error}") from None
        if len(name) < 2:
            raise ValueError("domain is empty")
        short = host_name.partition(".")[0].lower()
        return cls(name, subnet, frozenset((*_HOST_NAMES, *([short] if short and short != "localhost" else ()))))


def answer(query: bytes, asker: str, zone: Zone, directory: Directory) -> bytes | None:
    """The answer to a query from address ``asker``; empty: none; None: the upstream server is to be asked."""
    try:
        message = dns.message.from_wire(query, question_only=True)
    except (dns.exception.DNSException, ValueError):
        return _error(query, dns.rcode.FORMERR)
    if message.flags & dns.flags.QR:
        return b""
    if message.opcode() != dns.opcode.QUERY:
        return _error(query, dns.rcode.NOTIMP)
    if len(message.question) != 1:
        return _error(query, dns.rcode.FORMERR)
    question = message.question[0]
    if question.rdclass != dns.rdataclass.IN:
        return None
    name = question.name
    if name.is_subdomain(zone.domain):
        return _address_answer(message, zone, _first_label(name.relativize(zone.domain)), asker, directory)
    if len(name) == 2 and _find(_first_label(name) or "", zone, asker, directory):
        return _address_answer(message, zone, _first_label(name), asker, directory)
    if name.is_subdomain(_REVERSE) and (address := _reversed(name)) and address in zone.subnet.network:
        return _name_answer(message, zone, str(address), asker, directory)
    return None


def hosts_lines(instances: Iterable[tuple[str, Lease]], domain: str) -> list[str]:
    """Lines for the host's own hosts file, in the order of the names."""
    return [f"{lease.ipv4}\t{name}.{domain}" for name, lease in sorted(instances, key=lambda each: each[0])]


def failure(query: bytes) -> bytes:
    """The answer where the upstream server gave none."""
    return _error(query, dns.rcode.SERVFAIL)


def same_question(query: bytes, reply: bytes) -> bool:
    """Whether ``reply`` is one to ``query``: identifier and question agree, the case of letters apart."""
    if len(reply) < _HEADER.size or reply[:2] != query[:2] or not reply[2] & 0x80:
        return False
    end = _end_of_question(query)
    return end > 0 and reply[_HEADER.size : end].lower() == query[_HEADER.size : end].lower()


def _end_of_question(query: bytes) -> int:
    """Where the first question ends; 0 if it is malformed."""
    at = _HEADER.size
    while at < len(query) and query[at]:
        if query[at] > 63:
            return 0
        at += query[at] + 1
    return at + 5 if at + 5 <= len(query) else 0


def _error(query: bytes, code: dns.rcode.Rcode) -> bytes:
    """An answer that quotes nothing, for what cannot be parsed as well."""
    if len(query) < _HEADER.size or query[2] & 0x80:
        return b""
    end = _end_of_question(query)
    flags = 0x8000 | (query[2] & 0x79) << 8 | 0x80 | code
    return query[:2] + struct.pack(">HHHHH", flags, 1 if end else 0, 0, 0, 0) + query[_HEADER.size : end]


def _first_label(name: dns.name.Name) -> str | None:
    """The only label of a name; "" for the domain itself, None for deeper names."""
    labels = [label for label in name.labels if label]
    if len(labels) > 1:
        return None
    return labels[0].decode("ascii", "replace").lower() if labels else ""


def _find(label: str, zone: Zone, asker: str, directory: Directory) -> str | None:
    """The address of a name, for who may know it. The asker's own stack comes first, the host's name last."""
    lease = (directory.of_stack(asker, label) or directory.by_name(label)) if label else None
    if lease is not None:
        return lease.ipv4 if _may_reach(asker, lease, zone, directory) else None
    return str(zone.subnet.gateway) if label in zone.host_names else None


def _may_reach(asker: str, lease: Lease, zone: Zone, directory: Directory) -> bool:
    if asker in (lease.ipv4, str(zone.subnet.gateway)):
        return True
    known = directory.by_address(asker)
    if known is None or known[1].reach.closed:
        return False
    return known[1].meets(lease)


def _address_answer(
    query: dns.message.Message, zone: Zone, label: str | None, asker: str, directory: Directory
) -> bytes:
    address = _find(label, zone, asker, directory) if label else None
    wanted = query.question[0].rdtype
    if address is not None and wanted in (dns.rdatatype.A, dns.rdatatype.ANY):
        return _found(query, A(dns.rdataclass.IN, dns.rdatatype.A, address))  # type: ignore[no-untyped-call]
    return _nothing(query, zone, exists=address is not None or label == "")


def _name_answer(query: dns.message.Message, zone: Zone, address: str, asker: str, directory: Directory) -> bytes:
    label: str | None = None
    if address == str(zone.subnet.gateway):
        label = _HOST_NAMES[0]
    elif (known := directory.by_address(address)) and _may_reach(asker, known[1], zone, directory):
        label = known[0]
    wanted = query.question[0].rdtype
    if label is None or wanted not in (dns.rdatatype.PTR, dns.rdatatype.ANY):
        return _nothing(query, zone, exists=label is not None)
    target = dns.name.from_text(label, zone.domain)
    return _found(query, PTR(dns.rdataclass.IN, dns.rdatatype.PTR, target))  # type: ignore[no-untyped-call]


def _found(query: dns.message.Message, rdata: dns.rdata.Rdata) -> bytes:
    reply = _reply(query)
    reply.answer.append(dns.rrset.from_rdata(query.question[0].name, TTL, rdata))
    return reply.to_wire()


def _nothing(query: dns.message.Message, zone: Zone, *, exists: bool) -> bytes:
    reply = _reply(query)
    if not exists:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    server = dns.name.from_text(_HOST_NAMES[0], zone.domain)
    kind = dns.rdataclass.IN, dns.rdatatype.SOA
    soa = SOA(*kind, server, server, 1, 3600, 600, 86400, TTL)  # type: ignore[no-untyped-call]
    reply.authority.append(dns.rrset.from_rdata(zone.domain, TTL, soa))
    return reply.to_wire()


def _reply(query: dns.message.Message) -> dns.message.Message:
    reply = dns.message.make_response(query, recursion_available=True)
    reply.flags |= dns.flags.AA
    return reply


def _reversed(name: dns.name.Name) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(dns.reversename.to_address(name))
    except (dns.exception.DNSException, ValueError):
        return None
