"""Names of closed guests, as messages: what is sent upstream, and what the guest gets."""

from __future__ import annotations

import dns.edns
import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.network.closed_names import (
    Found,
    Question,
    nothing,
    read_addresses,
    read_question,
    refusal,
    reply_with,
    upstream_query,
)


def test_questions() -> None:
    made = {
        (name, kind, klass): read_question(dns.message.make_query(name, kind, klass).to_wire())
        for name, kind, klass in (
            ("API.Example.com.", "A", "IN"), ("a.b", "TXT", "IN"), ("a.b", "A", "CH"), (r"a\\.b.c", "A", "IN"),
        )
    }  # fmt: skip
    assert list(made.values()) == [
        Question("api.example.com", True), Question("a.b", False), Question("", False), Question("", True),
    ]  # fmt: skip
    assert read_question(dns.message.make_response(dns.message.make_query("a.b", "A")).to_wire()) is None


def test_our_query_carries_the_name_only() -> None:
    query = dns.message.from_wire(upstream_query("a.b"))
    assert [each.to_text() for each in query.question] == ["a.b. IN A"]
    assert (query.options, len(upstream_query("a.b"))) == ((), 12 + 5 + 4 + 11)


def upstream(*records: tuple[str, int, str, str], rcode: dns.rcode.Rcode = dns.rcode.NOERROR) -> bytes:
    reply = dns.message.make_response(dns.message.from_wire(upstream_query("a.b")))
    reply.set_rcode(rcode)
    for name, seconds, kind, data in records:
        reply.answer.append(dns.rrset.from_text(name, seconds, "IN", kind, data))
    return reply.to_wire()


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (upstream(("a.b.", 60, "A", "192.0.2.1")), Found(0, ("192.0.2.1",), 60)),
        (upstream(("a.b.", 60, "CNAME", "c.d."), ("c.d.", 5, "A", "192.0.2.1")), Found(0, ("192.0.2.1",), 5)),
        (upstream(("a.b.", 9999, "A", "192.0.2.1")), Found(0, ("192.0.2.1",), 300)),
        (upstream(("evil.test.", 60, "A", "192.0.2.1")), Found(0, (), 300)),
        (upstream(rcode=dns.rcode.NXDOMAIN), Found(3, (), 300)),
        (upstream(rcode=dns.rcode.REFUSED), Found(2, (), 0)),
        (upstream(("a.b.", 60, "CNAME", "a.b.")), Found(2, (), 0)),
        (b"", Found(2, (), 0)),
    ],
)
def test_answers(reply: bytes, found: Found) -> None:
    assert read_addresses(reply) == found


def test_replies() -> None:
    """The question as it was asked; what goes along with upstream's answer does not reach the guest."""
    query = dns.message.make_query("A.b.", "A", use_edns=0)
    reply = dns.message.from_wire(reply_with(query.to_wire(), "a.b", Found(0, ("192.0.2.1", "192.0.2.2"), 7)))
    assert reply.id == query.id and reply.question == query.question
    [answer] = reply.answer
    assert (answer.ttl, sorted(item.to_text() for item in answer)) == (7, ["192.0.2.1", "192.0.2.2"])
    assert not reply.authority and not reply.additional
    refused = dns.message.from_wire(refusal(query.to_wire(), "because"))
    [option] = refused.options
    assert isinstance(option, dns.edns.EDEOption)
    assert (refused.rcode(), option.code, option.text) == (dns.rcode.NXDOMAIN, 18, "because")
    empty = dns.message.from_wire(nothing(query.to_wire()))
    assert (empty.rcode(), empty.answer) == (dns.rcode.NOERROR, [])


@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    read_question(data)
    read_addresses(data)
    for reply in (refusal(data, "x"), nothing(data), reply_with(data, "a.b", Found(0, ("192.0.2.1",), 1))):
        assert isinstance(reply, bytes)
