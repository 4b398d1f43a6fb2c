"""SIGKILL of the server, SIGKILL of the VMM, and a full disk, at every moment of every operation: the world is
whole afterwards.

For each operation the moments are visited one after another until one run of it is not hit; of each
operation as many as KILL_POINTS says (default 2, spread from a random one on; ``all`` for all, which
takes an hour). The same moments are all visited, with a VMM in memory, by tests/instances/test_lifecycle.py.

After each the instance is in a state that the operation may leave, no process, TAP, file, lease or
reservation is without an owner, everybody can be used, and everything can be deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.appliance import Appliance, check_host, short_directory
from tests.real.operations import OPERATIONS, check_clear, check_whole, clean_up, wait_at_rest

pytestmark = [pytest.mark.real, pytest.mark.slow]

_STRIDE = 4
"""Moments from one visited to the next where not all are."""
_POINTS = os.environ.get("KILL_POINTS", "2")

Record = Callable[[str, object], None]


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("kill")


@pytest.fixture
async def armed(directory: Path) -> AsyncIterator[Appliance]:
    """A server with a bomb in it, and the image."""
    appliance = Appliance(directory)
    try:
        await appliance.start(killable=str(directory / "bomb"))
        await appliance.import_busybox()
        yield appliance
    finally:
        appliance.close()


class Trigger:
    """The test's side of the bomb."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "bomb"
        self._where = directory / "bomb.where"
        self._run = 0
        self.visited: list[str] = []

    def moments(self) -> Iterator[int]:
        """Those to visit, until one is not there."""
        every = _POINTS == "all"
        for moment in itertools.count(0 if every else random.randrange(_STRIDE), 1 if every else _STRIDE):
            if not every and len(self.visited) == int(_POINTS):
                return
            yield moment

    def set(self, moment: int, kind: str, **more: Any) -> None:
        self._where.unlink(missing_ok=True)
        side = self._file.with_suffix(".new")
        self._run += 1
        side.write_text(json.dumps({"run": self._run, "kind": kind, "at": moment, "spare": "", **more}))
        side.rename(self._file)

    def release(self) -> str:
        """Where it struck; empty if it did not."""
        self._file.unlink(missing_ok=True)
        struck = self._where.read_text() if self._where.exists() else ""
        if struck:
            self.visited.append(struck)
        return struck

    def report(self, operation: str, record: Record) -> None:
        assert self.visited, "no moment was visited"
        print(f"\n{operation}: {len(self.visited)} moments, {', '.join(self.visited)}")
        record("moments", len(self.visited))


@pytest.mark.parametrize("name", OPERATIONS)
async def test_server_killed_at_every_moment(
    armed: Appliance, directory: Path, name: str, record_property: Record
) -> None:
    operation, trigger = OPERATIONS[name], Trigger(directory)
    for moment in trigger.moments():
        await operation.prepare(armed)
        trigger.set(moment, "server")
        with contextlib.suppress(httpx.TransportError, OSError):
            await operation.act(armed)
        struck = trigger.release()
        if not struck:
            await clean_up(armed)
            break
        await armed.wait_killed()
        where = f"server killed {struck} (moment {moment}) of {name}"
        await armed.start(killable=str(directory / "bomb"))
        states = await wait_at_rest(armed, operation.states, f"{where}\n{armed.log_tail()}")
        assert "Unknown" not in states.values()
        await check_whole(armed, f"{where}\n{armed.log_tail()}")
        await clean_up(armed)
        armed.log.write_text("")
    trigger.report(f"{name}, server killed", record_property)


GONE = {"create": {"gone", "Stopped"}, "delete": {"gone"}, "standby": {"Standby", "Stopped"},
        "restore": {"Standby", "Stopped"}, "unpacking": {"Standby", "Stopped"}}  # fmt: skip
"""States after the VMM was killed, where it is not just Stopped."""


@pytest.mark.parametrize("name", [*OPERATIONS, "fork's own"])
async def test_vmm_killed_at_every_moment(
    armed: Appliance, directory: Path, name: str, record_property: Record
) -> None:
    """The server goes on all the while. Of a fork the source's VMM is killed, or that of the fork itself."""
    operation, trigger = OPERATIONS[name.removesuffix("'s own")], Trigger(directory)
    for moment in trigger.moments():
        await operation.prepare(armed)
        spare = (await armed.get("/instances/one"))["id"] if name == "fork's own" else ""
        trigger.set(moment, "vmm", spare=spare)
        answer = await operation.act(armed)
        struck = trigger.release()
        where = f"VMM killed {struck} (moment {moment}) of {name}"
        if not struck:
            assert answer.is_success, f"{answer.text}: {where}"
            await clean_up(armed)
            break
        check_clear(answer, where)
        where += f"\n{answer.text}\n{armed.log_tail()}"
        states = await wait_at_rest(armed, {"Running"} if spare else GONE.get(name, {"Stopped"}), where)
        assert spare or "two" not in states or states["two"] in ("Running", "Stopped"), f"{states}: {where}"
        await check_whole(armed, where)
        await clean_up(armed)
        armed.log.write_text("")
    trigger.report(f"{name}, VMM killed", record_property)


@pytest.mark.parametrize("name", OPERATIONS)
async def test_every_write_fails_once(armed: Appliance, directory: Path, name: str, record_property: Record) -> None:
    """As on a full disk: told clearly, the old state or the new one. The real full disk is in test_full_disk.py."""
    operation, trigger = OPERATIONS[name], Trigger(directory)
    for moment in trigger.moments():
        await operation.prepare(armed)
        trigger.set(moment, "write")
        answer = await operation.act(armed)
        struck = trigger.release()
        where = f"no space for {struck} (moment {moment}) of {name}"
        if not struck:
            assert answer.is_success, f"{answer.text}: {where}"
            await clean_up(armed)
            break
        check_clear(answer, where)
        where += f"\n{answer.text}\n{armed.log_tail()}"
        await wait_at_rest(armed, operation.states, where)
        await check_whole(armed, where)
        await clean_up(armed)
        armed.log.write_text("")
    trigger.report(f"{name}, a write failed", record_property)
