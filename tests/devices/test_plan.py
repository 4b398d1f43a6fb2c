"""The plans there and back, from wherever the function is."""

from __future__ import annotations

import itertools

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hypeman.devices.plan import (
    Now,
    Probe,
    SetOverride,
    SetPersistence,
    Step,
    Unbind,
    plan_bind,
    plan_return,
)
from hypeman.devices.types import Binding

A = "0000:01:00.0"


def binding(driver: str | None, override: str = "", *, persistence: bool = False) -> Binding:
    return Binding(address=A, instance_id="i", driver=driver, override=override, persistence=persistence, boot_id="b")


def after(now: Now, step: Step) -> Now:
    """What the kernel makes of a step; the native driver is "native"."""
    match step:
        case SetOverride(driver=driver):
            return msgspec.structs.replace(now, override=driver)
        case Unbind(driver=driver):
            assert now.driver == driver
            return msgspec.structs.replace(now, driver=None)
        case Probe(driver=driver):
            assert now.driver is None
            assert driver == (now.override or "native"), "the kernel would choose another driver"
            return msgspec.structs.replace(now, driver=driver)
        case SetPersistence():
            return now


def test_there() -> None:
    assert plan_bind(binding("native"), Now("native", "")) == (
        SetOverride(A, "vfio-pci"), Unbind(A, "native"), Probe(A, "vfio-pci"),
    )  # fmt: skip


def test_there_without_a_driver() -> None:
    assert plan_bind(binding(None), Now(None, "")) == (SetOverride(A, "vfio-pci"), Probe(A, "vfio-pci"))


def test_nothing_to_do_where_it_is_done() -> None:
    assert plan_bind(binding("native"), Now("vfio-pci", "vfio-pci")) == ()
    assert plan_return(binding("native"), Now("native", "")) == ()


def test_back() -> None:
    assert plan_return(binding("native"), Now("vfio-pci", "vfio-pci")) == (
        Unbind(A, "vfio-pci"), SetOverride(A, ""), Probe(A, "native"),
    )  # fmt: skip


def test_persistence_of_a_gpu_ends_first_and_returns_last() -> None:
    taken = binding("nvidia", persistence=True)
    assert plan_bind(taken, Now("nvidia", ""))[0] == SetPersistence(A, on=False)
    assert plan_return(taken, Now("vfio-pci", "vfio-pci"))[-1] == SetPersistence(A, on=True)


@given(
    before=st.sampled_from([("native", ""), (None, ""), ("vfio-pci", "vfio-pci"), (None, "none"), ("other", "other")]),
    stops=st.lists(st.integers(0, 4), max_size=4),
)
def test_from_any_interruption_both_ways_lead_to_their_ends(before: tuple[str | None, str], stops: list[int]) -> None:
    """Any prefix of either plan, any number of times, then one of them whole."""
    start = Now(*before)
    taken = binding(*before)
    now = start
    for stop, plan in zip(stops, itertools.cycle((plan_bind, plan_return)), strict=False):
        for step in plan(taken, now)[:stop]:
            now = after(now, step)
    there = now
    for step in plan_bind(taken, there):
        there = after(there, step)
    assert there == Now("vfio-pci", "vfio-pci")
    for begin in (now, there):
        back = begin
        for step in plan_return(taken, back):
            back = after(back, step)
        assert back == start


def test_steps_can_be_stored() -> None:
    steps = plan_bind(binding("nvidia", persistence=True), Now("nvidia", ""))
    assert msgspec.json.decode(msgspec.json.encode(steps), type=tuple[Step, ...]) == steps
