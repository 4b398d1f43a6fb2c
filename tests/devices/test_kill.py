"""SIGKILL before and after every write of a bind and of an unbind; then a new server on the same store.

An instance that is still recorded keeps its devices and can go on either way; one that is not gets
everything back to the drivers there were.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from hypeman.devices.registry import BINDINGS, VGPUS
from hypeman.devices.service import Devices
from hypeman.devices.types import CreateDeviceRequest
from hypeman.store import Store
from tests.devices.kernel import add_mdev_parent, render
from tests.devices.machine import GPU, NIC, Machine

R = TypeVar("R")

MDEV_PARENT = "0000:08:00.0"
ROOT = Path(__file__).parents[2]


def served(root: Path, job: Callable[[Machine, Store, Devices], Awaitable[R]], *, settle: bool = False) -> R:
    """Run ``job`` on a server of its own on the machine at ``root``."""

    async def main() -> R:
        machine = Machine(root, fresh=False)
        store = Store.open(root / "store")
        devices = machine.service(store)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            if settle:
                await nursery.start(devices.run)
            await devices.prepare()
            result = await job(machine, store, devices)
            nursery.cancel_scope.cancel()
        store.close()
        return result

    return trio.run(main)


def prepare(root: Path, *, bound: bool) -> str:
    """A machine on which instance "one" has a GPU, a NIC and a vGPU; how it looked before."""
    machine = Machine(root)
    add_mdev_parent(machine.tree, MDEV_PARENT, {"t-1": ("T4-1Q", "framebuffer=1024M", 4)})

    async def job(machine: Machine, store: Store, devices: Devices) -> str:
        for address, name in ((GPU, "gpu"), (NIC, "nic")):
            await devices.register(CreateDeviceRequest(pci_address=address, name=name))
        await store.write(lambda txn: devices.claim(txn, "one", ("gpu", "nic"), "T4-1Q"))
        before = render(machine.tree)
        if bound:
            await devices.bind("one")
        return before

    return served(root, job)


def run_killed(root: Path, operation: str, when: str, number: int) -> int | None:
    """None if it was killed, else how many writes there were."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.devices.killed", str(root), operation, when, str(number)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if result.returncode == -signal.SIGKILL:
        return None
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


async def end_instance(machine: Machine, store: Store, devices: Devices) -> None:
    await devices.unbind("one")
    await store.write(lambda txn: devices.release(txn, "one"))


async def lose_instance(machine: Machine, store: Store, devices: Devices) -> None:
    """Its record goes without an unbind."""
    await store.write(lambda txn: devices.release(txn, "one"))


async def bind_again(machine: Machine, store: Store, devices: Devices) -> None:
    await devices.bind("one")
    assert devices.get("gpu").bound_to_vfio
    assert devices.get("nic").bound_to_vfio


async def left(machine: Machine, store: Store, devices: Devices) -> list[str]:
    return store.read(lambda txn: [*txn.keys(BINDINGS), *txn.keys(VGPUS)])


async def looked_at(machine: Machine, store: Store, devices: Devices) -> str:
    return render(machine.tree)


def check(root: Path, before: str, turn: int) -> None:
    """What may follow a kill, in turn: go on to the end and back, or go back at once, or be forgotten."""
    if turn % 3 == 0:
        served(root, bind_again)
        served(root, end_instance)
    elif turn % 3 == 1:
        served(root, end_instance, settle=True)
    else:
        served(root, lose_instance)
        served(root, looked_at, settle=True)
    assert served(root, looked_at) == before
    assert served(root, left) == []


@pytest.mark.slow
def test_killed_at_every_write(tree_root: Path) -> None:
    kills = 0
    for operation in ("bind", "unbind"):
        saved = tree_root / "saved"
        before = prepare(tree_root / "work", bound=operation == "unbind")
        shutil.copytree(tree_root / "work", saved, symlinks=True)
        number, lived = 0, False
        while not lived:
            for when in ("before", "after"):
                shutil.rmtree(tree_root / "work")
                shutil.copytree(saved, tree_root / "work", symlinks=True)
                lived = run_killed(tree_root / "work", operation, when, number) is not None
                kills += not lived
                check(tree_root / "work", before, kills)
            number += 1
        shutil.rmtree(tree_root / "work")
        shutil.rmtree(saved)
    print(f"{kills} kills, nothing lost or left")
    assert kills >= 30
