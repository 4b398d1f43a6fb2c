"""The arithmetic that keeps guests' clocks right, and when a client corrects one."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hypeman.guest import clock
from hypeman.guest.client import GuestClient
from hypeman.guest.clock import MILLISECOND, Sample
from hypeman.guest.failures import GuestError
from hypeman.guest.fields import FieldWriter, Tag
from hypeman.guest.protocol import Op
from tests.guest.conftest import Agent


@given(
    error=st.integers(-(10**12), 10**12),
    there=st.integers(0, 10**9),
    back=st.integers(0, 10**9),
    now=st.integers(10**18, 2 * 10**18),
)
def test_a_correction_never_makes_it_worse(error: int, there: int, back: int, now: int) -> None:
    """Whatever the way took in each direction; and a difference above the uncertainty becomes smaller than it."""
    sample = Sample(asked=now, answered=now + there + back, guest=now + there - error)
    assert abs(sample.behind - error) <= sample.uncertainty + 1
    left = abs(error - sample.correction)
    assert left <= abs(error) + 1 or left <= sample.uncertainty + 1
    assert left <= 2 * max(sample.uncertainty, clock.TOLERANCE) + 1


def test_a_clock_that_is_wrong_is_looked_at_sooner() -> None:
    good = Sample(0, 2 * MILLISECOND, MILLISECOND)
    wrong = Sample(0, 2 * MILLISECOND, 1000 * MILLISECOND)
    slow = Sample(0, 400 * MILLISECOND, 200 * MILLISECOND)
    assert clock.next_after(good) == clock.INTERVAL == clock.next_after(None)
    assert clock.INTERVAL_LEAST <= clock.next_after(slow) < clock.INTERVAL
    assert clock.next_after(wrong) == clock.INTERVAL_LEAST


class Corrections:
    """A client whose corrections are counted; the guest's answers come from ``behind``."""

    def __init__(self, client: GuestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times: list[float] = []
        monkeypatch.setattr(client, "correct_clock", self._correct)

    async def _correct(self, *, good: int) -> Sample:
        self.times.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        return Sample(0, 0, 0)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By how much the host's clock was set; one number."""
    moved = [0]
    monkeypatch.setattr(clock, "host_step", lambda: moved[0])
    return moved


async def test_when_a_clock_is_corrected(
    step: list[int], monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """At once, regularly, when the host's clock was set, and after a pause; not during one."""
    ours, _ = trio.testing.memory_stream_pair()
    client = GuestClient(ours, nonce=bytes(16))
    corrections = Corrections(client, monkeypatch)
    client._greeted.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run_beside)
        await trio.sleep(2 * clock.INTERVAL + 1)
        begin = corrections.times[0]
        assert corrections.times == [begin, begin + clock.INTERVAL, begin + 2 * clock.INTERVAL]
        step[0] = -3_600_000_000_000
        await trio.sleep(clock.STEP_CHECK)
        assert len(corrections.times) == 4
        client.hold(True)
        await trio.sleep(1)
        count = len(corrections.times)
        await trio.sleep(10 * clock.INTERVAL)
        assert len(corrections.times) == count, "a paused guest is left alone"
        client.hold(False)
        await trio.sleep(0.5)
        assert len(corrections.times) == count + 1
        nursery.cancel_scope.cancel()


async def test_the_clock_of_a_restored_guest_is_corrected_when_it_is_thawed(
    step: list[int], monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Before that it has other work, which its client waits for; without a thaw it thaws itself."""
    for seconds, first in ((5.0, 5.0), (None, 10.0)):
        ours, _ = trio.testing.memory_stream_pair()
        client = GuestClient(ours, nonce=bytes(16))
        client.restored = True
        corrections = Corrections(client, monkeypatch)
        client._greeted.set()
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run_beside)
            if seconds is not None:
                await trio.sleep(seconds)
                client._thawed.set()
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert first <= corrections.times[0] - begin <= first + 0.5


@pytest.mark.parametrize("told", [b"", FieldWriter().u64(Tag.CLOCK_NS, 2**64 - 1).render()])
async def test_a_guest_that_reports_no_time(monkeypatch: pytest.MonkeyPatch, told: bytes) -> None:
    ours, _ = trio.testing.memory_stream_pair()
    client = GuestClient(ours, nonce=bytes(16))

    async def request(op: Op, fields: FieldWriter | None) -> bytes:
        await trio.lowlevel.checkpoint()
        return told

    monkeypatch.setattr(client, "request", request)
    with pytest.raises(GuestError, match="did not report its time"):
        await client.correct_clock()
    client._greeted.set()
    await client.run_beside()  # gives up, quietly


async def test_the_agent_reports_its_time_and_does_not_change_the_clock(client: GuestClient, agent: Agent) -> None:
    """Where it is not process 1 of a guest, a correction changes nothing."""
    before = clock.host_step()
    sample = await client.read_clock()
    assert sample.asked <= sample.guest <= sample.answered <= time.time_ns()
    await client.correct_clock()
    assert abs(clock.host_step() - before) < MILLISECOND
