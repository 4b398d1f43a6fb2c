"""Names for guests that may look up some only, as DNS messages. Pure.

Nothing that such a guest writes is sent on: a name that it may look up is asked upstream in a query of ours, for its
IPv4 addresses only, and answered in a reply of ours. So neither questions nor answers carry anything else.
"""

from __future__ import annotations

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import msgspec
from dns.rdtypes.IN.A import A

from hypeman.network.names import failure

MAX_TTL = 300
"""Seconds; an address is used again within it without another look-up."""
MAX_ADDRESSES = 16
_PAYLOAD = 1232
"""Bytes of an answer over UDP that pass everywhere."""


class Question(msgspec.Struct, frozen=True):
    name: str
    """Lower case, without the last dot; empty if it is not a host name."""
    addresses: bool
    """IPv4 addresses are asked for."""


class Found(msgspec.Struct, frozen=True):
    rcode: int
    addresses: tuple[str, ...]
    seconds: int
    """For which they are valid."""


def read_question(query: bytes) -> Question | None:
    """None if it is not a query."""
    try:
        message = dns.message.from_wire(query, question_only=True)
    except (dns.exception.DNSException, ValueError):
        return None
    if message.flags & dns.flags.QR or message.opcode() != dns.opcode.QUERY or len(message.question) != 1:
        return None
    asked = message.question[0]
    in_internet = asked.rdclass == dns.rdataclass.IN
    text = asked.name.to_text(omit_final_dot=True).lower() if in_internet else ""
    return Question("" if "\\" in text else text, in_internet and asked.rdtype == dns.rdatatype.A)


def upstream_query(name: str) -> bytes:
    """Our query for the addresses of ``name``."""
    return dns.message.make_query(name + ".", dns.rdatatype.A, use_edns=0, payload=_PAYLOAD).to_wire()


def is_cut(reply: bytes) -> bool:
    """Whether the answer did not fit and is to be asked for over TCP."""
    return len(reply) > 2 and bool(reply[2] & 0x02)


def read_addresses(reply: bytes) -> Found:
    """The addresses in an upstream server's answer, aliases followed."""
    try:
        message = dns.message.from_wire(reply)
        if not isinstance(message, dns.message.QueryMessage) or message.rcode() not in (
            dns.rcode.NOERROR,
            dns.rcode.NXDOMAIN,
        ):
            return Found(dns.rcode.SERVFAIL, (), 0)
        chain = message.resolve_chaining()
    except (dns.exception.DNSException, ValueError):
        return Found(dns.rcode.SERVFAIL, (), 0)
    seconds = max(0, min(MAX_TTL, chain.minimum_ttl))
    found = [item.address for item in chain.answer or () if isinstance(item, A)]
    return Found(message.rcode(), tuple(found[:MAX_ADDRESSES]), seconds)


def reply_with(query: bytes, name: str, found: Found) -> bytes:
    """What the guest gets for ``found``."""
    reply = _reply(query)
    if reply is None:
        return failure(query)
    reply.set_rcode(dns.rcode.Rcode(found.rcode))
    if found.addresses:
        owner = dns.name.from_text(name + ".")
        reply.answer.append(dns.rrset.from_text_list(owner, found.seconds, "IN", "A", found.addresses))
    return reply.to_wire()


def refusal(query: bytes, explanation: str) -> bytes:
    """No such name; with a reason for those who can read it (RFC 8914)."""
    reply = _reply(query)
    if reply is None:
        return failure(query)
    reply.set_rcode(dns.rcode.NXDOMAIN)
    if reply.edns >= 0:
        option = dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, explanation)
        reply.use_edns(0, options=[option], payload=_PAYLOAD)
    return reply.to_wire()


def nothing(query: bytes) -> bytes:
    """The name exists, but nothing of the kind that is asked for."""
    reply = _reply(query)
    return failure(query) if reply is None else reply.to_wire()


def _reply(query: bytes) -> dns.message.Message | None:
    try:
        return dns.message.make_response(dns.message.from_wire(query), recursion_available=True)
    except (dns.exception.DNSException, ValueError, NotImplementedError):
        return None
