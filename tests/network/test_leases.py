"""Leases: never one address twice, never one lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypeman.errors import InsufficientResources, InvalidState
from hypeman.network.addressing import Subnet
from hypeman.network.leases import GROUPS, all_leases, check_subnet, drop_lease, get_lease, take_lease
from hypeman.network.types import EgressMode, Lease, NetworkPlan
from hypeman.store import Store, Txn

SUBNET = Subnet.parse("10.100.0.0/16")
TINY = Subnet.parse("10.9.8.0/29")
PLAN = NetworkPlan()


@pytest.fixture
def txn(tmp_path: Path) -> Iterator[Txn]:
    with lmdb.open(str(tmp_path / "db")) as env, env.begin(write=True) as raw:
        yield Txn(raw)


def test_a_lease_has_everything(txn: Txn) -> None:
    plan = NetworkPlan(download_bps=5, upload_bps=6, egress_mode=EgressMode.ALL, isolated=False)
    lease = take_lease(txn, "abcdefghijklmnopqrstuvwx", plan, SUBNET)
    assert lease == Lease(
        instance_id="abcdefghijklmnopqrstuvwx",
        cid=16777216,
        ipv4="10.100.0.2",
        mac="02:00:00:00:00:02",
        tap="hm-abcdefghijk",
        download_bps=5,
        upload_bps=6,
        egress_mode=EgressMode.ALL,
        isolated=False,
    )
    assert get_lease(txn, lease.instance_id) == lease


def test_without_network_there_is_only_a_cid(txn: Txn) -> None:
    lease = take_lease(txn, "a", NetworkPlan(enabled=False), SUBNET)
    assert lease == Lease(instance_id="a", cid=16777216)
    assert not lease.enabled
    assert take_lease(txn, "b", PLAN, SUBNET).ipv4 == "10.100.0.2"


def test_taking_twice_is_taking_once(txn: Txn) -> None:
    first = take_lease(txn, "a", PLAN, SUBNET)
    assert take_lease(txn, "a", PLAN, SUBNET) == first
    assert len(all_leases(txn)) == 1


def test_dropping_twice_gives_back_once(txn: Txn) -> None:
    for name in "abcde":
        take_lease(txn, name, PLAN, TINY)
    drop_lease(txn, "a", TINY)
    drop_lease(txn, "a", TINY)
    drop_lease(txn, "never there", TINY)
    assert take_lease(txn, "f", PLAN, TINY).ipv4 == "10.9.8.2"
    with pytest.raises(InsufficientResources, match=r"10\.9\.8\.0/29"):
        take_lease(txn, "g", PLAN, TINY)


def test_addresses_rest_before_they_are_used_again(txn: Txn) -> None:
    taken = [take_lease(txn, name, PLAN, TINY).ipv4 for name in "abc"]
    drop_lease(txn, "b", TINY)
    drop_lease(txn, "a", TINY)
    rest = [take_lease(txn, name, PLAN, TINY).ipv4 for name in "defg"]
    assert rest == ["10.9.8.5", "10.9.8.6", taken[1], taken[0]]


def test_ids_that_begin_alike_get_taps_of_their_own(txn: Txn) -> None:
    taps = {take_lease(txn, f"the-same-beginning-{number}", PLAN, SUBNET).tap for number in range(50)}
    assert len(taps) == 50


def test_another_subnet_is_refused_while_addresses_are_held(txn: Txn) -> None:
    take_lease(txn, "a", PLAN, SUBNET)
    other_gateway = Subnet.parse("10.100.0.0/16", "10.100.0.9")
    for subnet in (TINY, other_gateway):
        with pytest.raises(InvalidState, match=r"1 instances hold addresses of 10\.100\.0\.0/16"):
            check_subnet(txn, subnet)
    drop_lease(txn, "a", SUBNET)
    check_subnet(txn, TINY)
    assert take_lease(txn, "b", PLAN, TINY).ipv4 == "10.9.8.2"
    drop_lease(txn, "b", TINY)
    assert take_lease(txn, "c", PLAN, SUBNET).ipv4 == "10.100.0.2"


async def test_a_failed_transaction_leases_nothing(store: Store) -> None:
    def fail(txn: Txn) -> None:
        take_lease(txn, "a", PLAN, SUBNET)
        raise InvalidState("the instance's record was refused")

    with pytest.raises(InvalidState):
        await store.write(fail)
    lease = await store.write(lambda txn: take_lease(txn, "b", PLAN, SUBNET))
    assert lease.ipv4 == "10.100.0.2"


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.booleans()), max_size=60))
def test_leases_never_clash_and_never_leak(operations: list[tuple[bool, int, bool]]) -> None:
    """Against a model: held addresses are distinct, and exhaustion comes exactly when all five are held."""
    with TemporaryDirectory() as directory, lmdb.open(directory) as env, env.begin(write=True) as raw:
        txn = Txn(raw)
        held: dict[str, Lease] = {}
        for take, number, enabled in operations:
            name = f"instance-{number}"
            if not take:
                drop_lease(txn, name, TINY)
                held.pop(name, None)
                continue
            try:
                lease = take_lease(txn, name, NetworkPlan(enabled=enabled), TINY)
            except InsufficientResources:
                assert sum(each.enabled for each in held.values()) == TINY.guests
                continue
            held[name] = lease
            addressed = [each for each in held.values() if each.enabled]
            assert len(addressed) <= TINY.guests
            for field in ("ipv4", "mac", "tap"):
                assert len({getattr(each, field) for each in addressed}) == len(addressed)
            assert len({each.cid for each in held.values()}) == len(held)
        assert sorted(all_leases(txn), key=str) == sorted(held.values(), key=str)


def test_groups_have_a_number_while_a_lease_is_in_them(txn: Txn) -> None:
    first = take_lease(txn, "a", NetworkPlan(groups=("s/front", "s/back")), SUBNET)
    second = take_lease(txn, "b", NetworkPlan(groups=("s/back",)), SUBNET)
    assert (first.groups, second.groups) == ((1, 2), (2,))
    drop_lease(txn, "a", SUBNET)
    assert take_lease(txn, "c", NetworkPlan(groups=("t/back",)), SUBNET).groups == (1,), "a number that is free"
    assert take_lease(txn, "d", NetworkPlan(groups=("s/back",)), SUBNET).groups == (2,)
    for instance in "bcd":
        drop_lease(txn, instance, SUBNET)
    assert list(txn.scan(GROUPS)) == []


@pytest.mark.parametrize(
    ("one", "other", "meets"),
    [((), (), True), ((1,), (1, 2), True), ((1,), (2,), False), ((1,), (), False), ((), (1,), False)],
)
def test_who_meets_whom(one: tuple[int, ...], other: tuple[int, ...], meets: bool) -> None:
    here = Lease(instance_id="a", cid=3, isolated=False, groups=one)
    assert here.meets(Lease(instance_id="b", cid=4, isolated=False, groups=other)) is meets
    assert not here.meets(Lease(instance_id="b", cid=4, groups=one))
