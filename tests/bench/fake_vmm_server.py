"""The real server on the real host, but for its VMMs, which take no time: what is left is our own share.

``python -m tests.bench.fake_vmm_server`` reads its configuration from the environment, as ``hypeman serve``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hypeman import app
from hypeman.config import load_config
from hypeman.hypervisor.catalog import Catalog
from hypeman.instances.machine.machine import Machine
from hypeman.store import Store
from tests.fakes.fake_vmm import FakeDriver, FakeVmm
from tests.instances.fake_world import FakeGuest


class Guests:
    """Connects each channel with a guest that is ready at once."""

    def __init__(self) -> None:
        self._opening: list[FakeVmm] = []

    def opened(self, vmm: FakeVmm, stream: Any) -> None:
        self._opening.append(vmm)

    def connect(self, stream: Any, nonce: bytes) -> FakeGuest:
        return FakeGuest(self._opening.pop().process)


def serve(driver: FakeDriver) -> None:
    """Run the server with ``driver`` alone."""
    guests = Guests()
    driver.guest = guests.opened

    def catalog(settings: object, store: Store, *_: object, **__: object) -> Catalog:
        return Catalog((driver,), store=store, default="qemu", depends_on={})

    vars(app)["make_catalog"] = catalog
    vars(app)["Machine"] = partial(Machine, connect=guests.connect)  # type: ignore[arg-type]
    app.main(load_config())


if __name__ == "__main__":
    serve(FakeDriver())
