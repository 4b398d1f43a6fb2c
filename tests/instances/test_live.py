"""The channel to a guest that misbehaves: tried again, in peace, and never the server's end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from hypeman.guest.types import GuestEvent, Ready
from hypeman.hypervisor.interface import ExitReason, VmmExit, VmmGone
from hypeman.instances.machine.live import Live
from hypeman.instances.model.events import VmEvent


class _Vmm:
    handle = SimpleNamespace(config=SimpleNamespace(instance_id="one"))

    def __init__(self, *, good: int) -> None:
        self.opened = 0
        self._good = good

    async def open_channel(self) -> object:
        self.opened += 1
        if self.opened > self._good:
            raise OSError("not listening")
        return object()

    async def wait_exit(self) -> VmmExit:
        await trio.sleep(60)
        return VmmExit(ExitReason.POWEROFF)

    async def aclose(self) -> None:
        pass


class _Guest:
    """Says that it is ready, then fails."""

    def __init__(self, error: Exception | None) -> None:
        self._send, self.events = trio.open_memory_channel[GuestEvent](1)
        self._error = error

    async def run(self) -> None:
        self._send.send_nowait(Ready({}))
        self._send.close()
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("error", [None, ValueError("unforeseen bytes")])
async def test_a_lost_channel_is_opened_again_more_and_more_slowly(
    autojump_clock: trio.testing.MockClock, error: Exception | None
) -> None:
    vmm = _Vmm(good=1)
    reported: list[VmEvent] = []

    def connect(stream: Any, nonce: bytes) -> Any:
        return _Guest(error)

    live = Live(vmm, nonce=b"", boot=1, connect=connect)  # type: ignore[arg-type]
    await live.run(lambda _, event: reported.append(event))
    assert 60 < vmm.opened < 80, "once a second, after the first few"
    assert reported[-1] == VmmExit(ExitReason.POWEROFF)


async def test_a_guest_that_hangs_up_immediately_each_time(autojump_clock: trio.testing.MockClock) -> None:
    """Each connection brings news for the instance's task; once a second is as often as a guest may do that."""
    vmm = _Vmm(good=1_000_000)
    reported: list[VmEvent] = []
    live = Live(vmm, nonce=b"", boot=1, connect=lambda stream, nonce: _Guest(None))  # type: ignore[arg-type, return-value]
    await live.run(lambda _, event: reported.append(event))
    assert 60 < vmm.opened < 80 and len(reported) < 81


async def test_no_task_waits_for_the_guest_of_a_vmm_that_has_ended(autojump_clock: trio.testing.MockClock) -> None:
    live = Live(_Vmm(good=0), nonce=b"", boot=1, connect=lambda stream, nonce: _Guest(None))  # type: ignore[arg-type, return-value]
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.run, lambda _, event: None)
        with pytest.raises(VmmGone):
            await live.wait_guest(3600)
    assert trio.current_time() - begin < 3600
