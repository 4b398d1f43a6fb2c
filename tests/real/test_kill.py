"""SIGKILL of the server, SIGKILL of the VMM, and a full disk, at every moment of every operation: the world is
whole afterwards.

Of each operation one moment is visited, chosen at random, or as many as KILL_POINTS says. With KILL_POINTS=all
they are visited one after another until one run of the operation is not hit, which takes an hour for all; then
each operation is a test of its own. The same moments are all visited, with a VMM in memory, by
tests/instances/test_lifecycle.py.

After each the instance is in a state that the operation may leave, no process, TAP, file, lease or
reservation is without an owner, every instance can be used, and everything can be deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.appliance import Appliance, check_host, short_directory
from tests.real.operations import OPERATIONS, check_clear, check_whole, clean_up, wait_at_rest

pytestmark = [pytest.mark.real, pytest.mark.slow]

_POINTS = os.environ.get("KILL_POINTS", "1")
_RUNS = itertools.count(1)
_SPREAD = 12
"""A moment at random is one of so many first ones; an operation has 3 to 40."""


def groups(names: Iterable[str]) -> pytest.MarkDecorator:
    """One test for each operation, or one for all, which spares the start of many servers."""
    each = [[name] for name in names] if _POINTS == "all" else [[*names]]
    return pytest.mark.parametrize("names", each, ids=lambda group: group[0] if len(group) == 1 else "all")


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("kill")


@pytest.fixture
async def armed(directory: Path) -> AsyncIterator[Appliance]:
    """A server with a bomb in it, and the image."""
    appliance = Appliance(directory, REQUEST_TIMEOUT="600")  # a busy machine is no answer
    try:
        await appliance.start_with_image(killable=str(directory / "bomb"))
        yield appliance
    finally:
        appliance.close()


class Trigger:
    """The test's side of the bomb."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "bomb"
        self._where = directory / "bomb.where"
        self.struck = ""
        self.visited: list[str] = []

    def moments(self) -> Iterator[int]:
        """Those to visit."""
        if _POINTS == "all":
            for moment in itertools.count():
                yield moment
                if not self.struck:
                    return
        for _ in range(int(_POINTS)):
            moment = random.randrange(_SPREAD)
            yield moment
            while not self.struck and moment:  # the operation has fewer
                moment //= 2
                yield moment

    def set(self, moment: int, kind: str, **more: Any) -> None:
        self._where.unlink(missing_ok=True)
        side = self._file.with_suffix(".new")
        side.write_text(json.dumps({"run": next(_RUNS), "kind": kind, "at": moment, "spare": "", **more}))
        side.rename(self._file)

    def release(self) -> str:
        """Where it struck; empty if it did not."""
        self._file.unlink(missing_ok=True)
        self.struck = self._where.read_text() if self._where.exists() else ""
        if self.struck:
            self.visited.append(self.struck)
            print(f"{time.strftime('%H:%M:%S')} {self.struck}", flush=True)
        return self.struck

    def report(self, operation: str) -> None:
        assert self.visited, f"no moment of {operation} was visited"
        print(f"\n{operation}: {len(self.visited)} moments, {', '.join(self.visited)}")


FORK_ITSELF = "fork's own"
"""A fork, of which the source's VMM is spared."""

Aftermath = Callable[[str, str], Awaitable[object]]
"""Waits until all is at rest after the operation (its name) was struck (where), and looks how."""


async def strike(armed: Appliance, directory: Path, names: list[str], kind: str, aftermath: Aftermath) -> None:
    """Have each operation struck at each moment to visit: what is left is whole, and can be deleted."""
    for name in names:
        operation, trigger = OPERATIONS[name if name != FORK_ITSELF else "fork"], Trigger(directory)
        for moment in trigger.moments():
            await operation.prepare(armed)
            spare = (await armed.get("/instances/one"))["id"] if name == FORK_ITSELF else ""
            trigger.set(moment, kind, spare=spare)
            answer, output = None, "no answer"
            with contextlib.suppress(httpx.TransportError, OSError):  # from a server that was killed
                answer = await operation.act(armed)
                output = answer.text
            if struck := trigger.release():
                where = f"{kind} struck {struck} (moment {moment}) of {name}: {output}"
                try:
                    assert answer is not None or kind == "server", where
                    if answer is not None:
                        check_clear(answer, where)
                    await aftermath(name, where)
                    await check_whole(armed, where)
                except Exception as error:
                    error.add_note(armed.log_tail())
                    raise
            else:
                assert answer is not None and answer.is_success, f"{name}: {output}"
            await clean_up(armed)
            armed.log.write_text("")
        trigger.report(f"{name}, {kind} struck")


@groups(OPERATIONS)
async def test_server_killed_at_every_moment(armed: Appliance, directory: Path, names: list[str]) -> None:
    async def aftermath(name: str, where: str) -> None:
        await armed.wait_killed()
        await armed.start(killable=str(directory / "bomb"))
        states = await wait_at_rest(armed, OPERATIONS[name].states, where)
        assert "Unknown" not in states.values(), where

    await strike(armed, directory, names, "server", aftermath)


GONE = {"create": {"gone", "Stopped"}, "delete": {"gone"}, "standby": {"Standby", "Stopped"},
        "restore": {"Standby", "Stopped"}, "unpacking": {"Standby", "Stopped"}, FORK_ITSELF: {"Running"}}  # fmt: skip
"""States after the VMM was killed, where it is not just Stopped."""


@groups([*OPERATIONS, FORK_ITSELF])
async def test_vmm_killed_at_every_moment(armed: Appliance, directory: Path, names: list[str]) -> None:
    """The server goes on all the while. Of a fork the source's VMM is killed, or that of the fork itself."""

    async def aftermath(name: str, where: str) -> None:
        states = await wait_at_rest(armed, GONE.get(name, {"Stopped"}), where)
        assert name == FORK_ITSELF or states.get("two", "Running") in ("Running", "Stopped"), f"{states}: {where}"

    await strike(armed, directory, names, "vmm", aftermath)


@groups(OPERATIONS)
async def test_every_write_fails_once(armed: Appliance, directory: Path, names: list[str]) -> None:
    """As on a full disk: a clear error, the old state or the new one. The real full disk is in test_full_disk.py."""

    async def aftermath(name: str, where: str) -> None:
        await wait_at_rest(armed, OPERATIONS[name].states, where)

    await strike(armed, directory, names, "write", aftermath)
