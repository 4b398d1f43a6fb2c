"""What is common to the processes of all kinds of VMM."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
import trio.testing

from hypeman.host.processes import Process
from hypeman.hypervisor.interface import VmmBroken
from hypeman.hypervisor.vmm_process import end


class _Unkillable:
    pid = 7
    killed = closed = False

    def kill(self) -> None:
        self.killed = True

    async def wait(self) -> int | None:
        await trio.sleep_forever()
        raise AssertionError

    def close(self) -> None:
        self.closed = True


async def test_a_process_that_does_not_end_is_reported(autojump_clock: trio.testing.MockClock) -> None:
    """It waits in the kernel for a disk that does not answer; the caller gets an error instead of waiting."""
    process = _Unkillable()
    with trio.fail_after(60), pytest.raises(VmmBroken, match="process 7 did not end"):
        await end(cast(Process, cast(Any, process)))
    assert process.killed and not process.closed, "it is still there, to be tried again"
