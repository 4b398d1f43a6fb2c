"""Run inside the virtual host by the device tests: the service on a real sysfs, one call per process.

    python3 -m tests.metal.inside COMMAND ARGUMENT... [+ COMMAND ARGUMENT...]

Prints the last result as JSON. Several commands in one process save its start, which takes seconds here. ``kills``
forks a process per call and kills each before or after one of its writes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from hypeman.config import DevicesConfig
from hypeman.devices.registry import BINDINGS
from hypeman.devices.service import Devices
from hypeman.devices.types import CreateDeviceRequest
from hypeman.errors import HypemanError
from hypeman.host.sysfs import Sysfs
from hypeman.store import Store

STORE = Path("/var/lib/hypeman-devices")
DEADLINE = 60.0
SETTLING = {"list": (True, DEADLINE), "unbind-held": (True, 10.0)}
"""Commands that need a service that releases what nobody owns, and its deadline for a change by the kernel."""

Job = Callable[[Devices, Store], Awaitable[object]]


class DyingSysfs(Sysfs):
    """The real sysfs, which kills its process at a write."""

    kill_before = kill_after = -1
    writes = 0

    def write_now(self, path: str, text: str) -> None:
        number = self.writes
        self.writes += 1
        if number == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write_now(path, text)
        if number == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


async def serve(job: Job, sysfs: Sysfs, *, settle: bool) -> object:
    store = Store.open(STORE)
    devices = Devices(store, DevicesConfig(), sysfs=sysfs)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        if settle:
            await nursery.start(devices.run)
        else:
            await devices.prepare()
        result = await job(devices, store)
        nursery.cancel_scope.cancel()
    store.close()
    return result


def commands(words: list[str]) -> Job:
    async def job(devices: Devices, store: Store) -> object:
        result: object = None
        rest = words
        while rest:
            end = rest.index("+") if "+" in rest else len(rest)
            result = await command(rest[:end])(devices, store)
            rest = rest[end + 1 :]
        return result

    return job


def command(words: list[str]) -> Job:
    async def job(devices: Devices, store: Store) -> object:
        match words:
            case ["available"]:
                return await devices.available(everything=True)
            case ["register", address, name]:
                return await devices.register(CreateDeviceRequest(pci_address=address, name=name))
            case ["list"]:
                return devices.list()
            case ["claim", instance, profile, *names]:
                return await store.write(lambda txn: devices.claim(txn, instance, tuple(names), profile.strip("-")))
            case ["release", instance]:
                return await store.write(lambda txn: devices.release(txn, instance))
            case ["bind", instance, *uid]:
                user = int(uid[0]) if uid else 0
                await devices.bind(instance, uid=user, gid=user)
                return devices.sysfs_paths(instance)
            case ["unbind", instance]:
                await devices.unbind(instance)
                return None
            case ["delete", name]:
                await devices.delete(name)
                return None
            case ["unbind-held", instance]:
                return await unbind_held(devices, store, instance)
            case ["gpu"]:
                return await devices.gpu_status()
            case ["bindings"]:
                return store.read(lambda txn: list(txn.keys(BINDINGS)))
            case _:
                raise SystemExit(f"unknown command {words}")

    return job


HOLD = """
import fcntl, os, struct, sys
container, group = (os.open(f"/dev/vfio/{name}", os.O_RDWR) for name in ("vfio", sys.argv[1]))
fcntl.ioctl(group, 0x3B68, struct.pack("i", container))  # VFIO_GROUP_SET_CONTAINER
fcntl.ioctl(container, 0x3B66, 3)  # VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU
fcntl.ioctl(group, 0x3B6A, sys.argv[2].encode() + bytes(1))  # VFIO_GROUP_GET_DEVICE_FD
print("held", flush=True)
sys.stdin.read()
"""
"""Opens a device as a VMM does, and keeps it open."""


async def unbind_held(devices: Devices, store: Store, instance: str) -> dict[str, object]:
    """Bind, then unbind while another process has the device open, until it closes it; the first error, and the
    bindings meanwhile."""
    await devices.bind(instance)
    (path,) = map(Path, devices.sysfs_paths(instance))
    group = (path / "iommu_group").resolve().name
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, group, path.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None and holder.stdout is not None
    message = ""
    try:
        assert await trio.to_thread.run_sync(holder.stdout.readline) == b"held\n"
        try:
            await devices.unbind(instance)
        except HypemanError as error:
            message = error.message
        kept = store.read(lambda txn: list(txn.keys(BINDINGS)))
    finally:
        holder.kill()
        await trio.to_thread.run_sync(holder.wait)
    while store.read(lambda txn: list(txn.keys(BINDINGS))):
        await trio.sleep(0.1)
    return {"message": message, "kept": kept}


def in_child(words: list[str], *, before: int = -1, after: int = -1, settle: bool = False) -> bool:
    """Run a command in a process of its own; False if it was killed."""
    pid = os.fork()
    if pid == 0:
        sysfs = DyingSysfs(Path("/sys"), deadline=DEADLINE)
        sysfs.kill_before, sysfs.kill_after = before, after
        code = 1
        try:
            trio.run(lambda: serve(command(words), sysfs, settle=settle))
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, words
    return True


def drivers(addresses: list[str]) -> list[str]:
    links = (Path("/sys/bus/pci/devices") / address / "driver" for address in addresses)
    return [link.resolve().name if link.exists() else "" for link in links]


def kills(instance: str, addresses: list[str]) -> dict[str, int]:
    """Die at every write of a bind and of an unbind; continue after each as a restart would, in turn by completing the
    bind and by unbinding at once."""
    before = drivers(addresses)
    count = 0
    for operation in ("bind", "unbind"):
        number, survived = 0, False
        while not survived:
            for when in ("before", "after"):
                if operation == "unbind":
                    in_child(["bind", instance])
                survived = in_child(
                    [operation, instance],
                    before=number if when == "before" else -1,
                    after=number if when == "after" else -1,
                )
                count += not survived
                if count % 2:
                    in_child(["bind", instance], settle=True)
                    assert set(drivers(addresses)) == {"vfio-pci"}, (operation, when, number)
                in_child(["unbind", instance], settle=True)
                assert drivers(addresses) == before, (operation, when, number, drivers(addresses))
            number += 1
    return {"kills": count}


def main(words: list[str]) -> None:
    if words[0] == "kills":
        print(json.dumps(kills(words[1], words[2:])))
        return
    settle, deadline = SETTLING.get(words[0], (False, DEADLINE))
    sysfs = Sysfs(Path("/sys"), deadline=deadline)
    result: object = None
    try:
        result = trio.run(lambda: serve(commands(words), sysfs, settle=settle))
    except* HypemanError as group:
        error = group.exceptions[0]
        assert isinstance(error, HypemanError)
        result = {"error": error.code, "status": error.status, "message": error.message}
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
