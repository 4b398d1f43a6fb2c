"""A server that dies: ``python -m tests.devices.killed ROOT OPERATION before|after N``.

Opens the store of the made-up machine at ROOT, and binds or unbinds instance "one" with a SIGKILL
before or after the Nth write below /sys. Prints the number of writes if it lives to the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from hypeman.store import Store
from tests.devices.machine import Machine


async def main(root: Path, operation: str, when: str, number: int) -> None:
    machine = Machine(root, fresh=False)
    store = Store.open(root / "store")
    devices = machine.service(store)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await devices.prepare()
        if when == "before":
            machine.kernel.kill_before = number
        else:
            machine.kernel.kill_after = number
        if operation == "bind":
            await devices.bind("one")
        else:
            await devices.unbind("one")
        nursery.cancel_scope.cancel()
    print(len(machine.kernel.writes))


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
