"""What follows from an offset, and what cannot be a subnet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.network.addressing import Subnet, cid_of, cid_rank, mac_of, tap_name


@st.composite
def subnets(draw: st.DrawFn) -> Subnet:
    prefix = draw(st.integers(8, 30))
    base = draw(st.integers(0, 2**prefix - 1)) << (32 - prefix)
    size = 1 << (32 - prefix)
    gateway = draw(st.integers(1, size - 2))
    return Subnet.parse(f"{_dotted(base)}/{prefix}", _dotted(base + gateway))


def _dotted(number: int) -> str:
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


@given(subnets(), st.data())
def test_ranks_and_addresses_are_one_to_one(subnet: Subnet, data: st.DataObject) -> None:
    """Every rank has an address of its own that is neither network, broadcast nor gateway."""
    rank = data.draw(st.integers(0, subnet.guests - 1)) if subnet.guests else 0
    if not subnet.guests:
        return
    address = subnet.address(rank)
    assert subnet.rank(address) == rank
    assert subnet.holds(address)
    assert address not in map(str, (subnet.network[0], subnet.network[-1], subnet.gateway))
    assert mac_of(subnet.offset(rank)) != subnet.gateway_mac


@pytest.mark.parametrize("cidr", ["10.0.0.0/28", "10.0.0.0/30"])
def test_all_addresses_of_a_small_subnet_can_be_given_out(cidr: str) -> None:
    subnet = Subnet.parse(cidr)
    addresses = {subnet.address(rank) for rank in range(subnet.guests)}
    usable = {str(address) for address in subnet.network.hosts()} - {str(subnet.gateway)}
    assert addresses == usable


@pytest.mark.parametrize("address", ["10.100.0.0", "10.100.0.1", "10.100.255.255", "10.101.0.5"])
def test_what_no_guest_may_have(address: str) -> None:
    assert not Subnet.parse("10.100.0.0/16").holds(address)


@pytest.mark.parametrize(
    ("cidr", "gateway"),
    [
        ("10.0.0.0/31", ""),
        ("10.0.0.0/7", ""),
        ("10.0.0.1/24", ""),
        ("10.0.0.0/24", "10.0.0.0"),
        ("10.0.0.0/24", "10.0.0.255"),
        ("10.0.0.0/24", "10.0.1.1"),
    ],
)
def test_unusable_subnets_are_refused(cidr: str, gateway: str) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        Subnet.parse(cidr, gateway)


def test_macs_are_local_unicast_and_follow_the_offset() -> None:
    assert mac_of(1) == "02:00:00:00:00:01"
    assert mac_of(0x123456) == "02:00:00:12:34:56"


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=40), st.integers(0, 3))
def test_tap_names_fit(instance_id: str, attempt: int) -> None:
    name = tap_name(instance_id, attempt=attempt)
    assert name.startswith("hm-") and len(name) <= 14  # the shaper's name is one longer


def test_cids_are_beyond_the_reserved_ones() -> None:
    assert cid_of(0) > 2
    assert cid_rank(cid_of(77)) == 77
