"""Which names a guest can look up, as messages, and what the host's hosts file says."""

from __future__ import annotations

from pathlib import Path

import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.host.hosts_file import render, write_block
from hypeman.network.addressing import Subnet
from hypeman.network.names import Zone, answer, same_question
from hypeman.network.types import Lease

SUBNET = Subnet.parse("10.100.0.0/16")
ZONE = Zone.parse("hypeman.local", SUBNET, "Big-Iron.example.com")
WEB, DB, ALONE = "10.100.0.2", "10.100.0.3", "10.100.0.4"


class Instances:
    """web and db may reach each other, alone no one."""

    def __init__(self) -> None:
        self.leases = {
            name: Lease(instance_id=name, cid=number, ipv4=address, isolated=name == "alone")
            for number, (name, address) in enumerate({"web": WEB, "db": DB, "alone": ALONE}.items(), 3)
        }

    def by_name(self, name: str) -> Lease | None:
        return self.leases.get(name)

    def of_stack(self, asker: str, service: str) -> Lease | None:
        """``web`` and ``db`` are of one stack, in which ``db`` is the service store."""
        return self.leases["db"] if (asker, service) in ((WEB, "store"), (ALONE, "store")) else None

    def by_address(self, address: str) -> tuple[str, Lease] | None:
        return next(((name, lease) for name, lease in self.leases.items() if lease.ipv4 == address), None)


def ask(name: str, kind: str = "A", asker: str = WEB) -> tuple[str, list[str]] | None:
    """The code and the data of the answer; None if the upstream server is asked."""
    query = dns.message.make_query(name, kind).to_wire()
    reply = answer(query, asker, ZONE, Instances())
    if reply is None:
        return None
    assert same_question(query, reply)
    message = dns.message.from_wire(reply)
    data = [item.to_text() for rrset in message.answer for item in rrset]
    assert data or message.authority, "a negative answer must say how long it is valid"
    return dns.rcode.to_text(message.rcode()), data


@pytest.mark.parametrize(
    ("name", "asker", "expected"),
    [
        ("db.hypeman.local", WEB, ("NOERROR", [DB])),
        ("DB.Hypeman.Local", WEB, ("NOERROR", [DB])),
        ("db", WEB, ("NOERROR", [DB])),
        ("store", WEB, ("NOERROR", [DB])),
        ("store.hypeman.local", WEB, ("NOERROR", [DB])),
        ("store.hypeman.local", DB, ("NXDOMAIN", [])),
        ("store.hypeman.local", ALONE, ("NXDOMAIN", [])),
        ("alone.hypeman.local", WEB, ("NXDOMAIN", [])),
        ("alone.hypeman.local", ALONE, ("NOERROR", [ALONE])),
        ("db.hypeman.local", ALONE, ("NXDOMAIN", [])),
        ("alone.hypeman.local", "10.100.0.1", ("NOERROR", [ALONE])),
        ("db.hypeman.local", "10.100.9.9", ("NXDOMAIN", [])),
        ("nobody.hypeman.local", WEB, ("NXDOMAIN", [])),
        ("a.db.hypeman.local", WEB, ("NXDOMAIN", [])),
        ("hypeman.local", WEB, ("NOERROR", [])),
        ("gateway.hypeman.local", ALONE, ("NOERROR", ["10.100.0.1"])),
        ("host.hypeman.local", ALONE, ("NOERROR", ["10.100.0.1"])),
        ("big-iron", ALONE, ("NOERROR", ["10.100.0.1"])),
        ("alone", WEB, None),
        ("com", WEB, None),
        ("example.com", WEB, None),
        ("xhypeman.local", WEB, None),
    ],
)
def test_addresses(name: str, asker: str, expected: tuple[str, list[str]] | None) -> None:
    assert ask(name, asker=asker) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("3.0.100.10.in-addr.arpa", ("NOERROR", ["db.hypeman.local."])),
        ("1.0.100.10.in-addr.arpa", ("NOERROR", ["gateway.hypeman.local."])),
        ("4.0.100.10.in-addr.arpa", ("NXDOMAIN", [])),
        ("9.9.100.10.in-addr.arpa", ("NXDOMAIN", [])),
        ("1.2.0.192.in-addr.arpa", None),
        ("100.10.in-addr.arpa", None),
    ],
)
def test_names_of_addresses(name: str, expected: tuple[str, list[str]] | None) -> None:
    assert ask(name, "PTR") == expected


def test_a_name_without_such_data_exists() -> None:
    assert ask("db.hypeman.local", "AAAA") == ("NOERROR", [])
    assert ask("db.hypeman.local", "ANY") == ("NOERROR", [DB])
    assert ask("nobody.hypeman.local", "AAAA") == ("NXDOMAIN", [])


@given(st.binary(max_size=600))
def test_anything_may_be_asked(query: bytes) -> None:
    """Garbage gets an error, the upstream server's answer or nothing, and never anything longer than itself."""
    reply = answer(query, WEB, ZONE, Instances())
    if reply:
        assert reply[:2] == query[:2] and reply[2] & 0x80
        assert dns.message.from_wire(reply).rcode() != dns.rcode.NOERROR or len(query) > 12


@given(st.binary(min_size=12, max_size=80), st.integers(0, 79))
def test_a_damaged_query_is_survived(noise: bytes, at: int) -> None:
    query = bytearray(dns.message.make_query("db.hypeman.local", "A").to_wire())
    query[at % len(query)] ^= noise[0] | 1
    answer(bytes(query), WEB, ZONE, Instances())
    same_question(bytes(query), noise)


def test_an_answer_to_another_question_is_none() -> None:
    query = dns.message.make_query("example.com", "A").to_wire()
    other = bytearray(dns.message.make_response(dns.message.from_wire(query)).to_wire())
    assert same_question(query, bytes(other))
    assert not same_question(query, query)
    for at in (0, 1, 13, len(query) - 3):
        forged = bytearray(other)
        forged[at] ^= 0x11
        assert not same_question(query, bytes(forged))


@pytest.mark.parametrize("domain", ["", ".", "a..b", "x" * 64])
def test_bad_domains(domain: str) -> None:
    with pytest.raises(ValueError, match="domain"):
        Zone.parse(domain, SUBNET, "host")


def test_the_block_in_the_hosts_file(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("127.0.0.1\tlocalhost\n# mine")
    assert write_block(file, ["10.100.0.2\tweb.hypeman.local"])
    text = file.read_text()
    assert text.startswith("127.0.0.1\tlocalhost\n# mine\n# BEGIN hypeman")
    assert not write_block(file, ["10.100.0.2\tweb.hypeman.local"])
    file.write_text(text + "192.0.2.1\tadded.later\n")
    assert write_block(file, [])
    assert file.read_text() == "127.0.0.1\tlocalhost\n# mine\n192.0.2.1\tadded.later\n"
    broken = render("a\n", ["1\tb"]).replace("# END hypeman\n", "")
    assert render(broken, []) == "a\n"
