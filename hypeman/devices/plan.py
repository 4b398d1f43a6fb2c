"""Plans that bind a function to vfio-pci and back, as plain data.

Both plans are computed from the *current* state of the function and the desired one, so either can be
recomputed at any time: after a failure, after a crash between two steps, twice in a row. The return plan
needs only the Binding, which is stored before the first step; it undoes every prefix of the bind plan,
so the steps need no undo of their own.

    there:  (persistence off) · driver_override = vfio-pci · unbind · probe
    back:   unbind · driver_override as before · probe · (persistence on)
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from hypeman.devices.facts import VFIO_DRIVER
from hypeman.devices.types import Binding


class Hands(Protocol):
    """The operations of the steps (host/pci.py). Each raises HostError."""

    async def set_override(self, address: str, driver: str) -> None: ...
    async def unbind(self, address: str, driver: str) -> None: ...
    async def probe(self, address: str, driver: str) -> None:
        """Make the kernel probe for a driver; raises unless it is ``driver``."""
        ...

    async def set_persistence(self, address: str, *, on: bool) -> None: ...


class Now(msgspec.Struct, frozen=True):
    """Current state of a function."""

    driver: str | None
    override: str


class _Step(msgspec.Struct, frozen=True, tag=True):
    address: str


class SetPersistence(_Step, frozen=True):
    """NVIDIA's persistence daemon releases this GPU (or takes it again); other GPUs are not affected.

    It holds the device file open, and unbinding the driver would wait for that forever.
    """

    on: bool

    async def do(self, hands: Hands) -> None:
        await hands.set_persistence(self.address, on=self.on)


class SetOverride(_Step, frozen=True):
    """The only driver that may take this function; empty for any. By address: an id would match identical cards too."""

    driver: str

    async def do(self, hands: Hands) -> None:
        await hands.set_override(self.address, self.driver)


class Unbind(_Step, frozen=True):
    driver: str

    async def do(self, hands: Hands) -> None:
        await hands.unbind(self.address, self.driver)


class Probe(_Step, frozen=True):
    """The kernel probes for a driver again; it must be ``driver``."""

    driver: str

    async def do(self, hands: Hands) -> None:
        await hands.probe(self.address, self.driver)


Step = SetPersistence | SetOverride | Unbind | Probe


def plan_bind(binding: Binding, now: Now) -> tuple[Step, ...]:
    """Steps from ``now`` to vfio-pci."""
    steps: list[Step] = []
    address = binding.address
    if now.override != VFIO_DRIVER:
        steps.append(SetOverride(address, VFIO_DRIVER))
    if now.driver == VFIO_DRIVER:
        return tuple(steps)
    if binding.persistence and now.driver == binding.driver:
        steps.insert(0, SetPersistence(address, on=False))
    if now.driver is not None:
        steps.append(Unbind(address, now.driver))
    return (*steps, Probe(address, VFIO_DRIVER))


def plan_return(binding: Binding, now: Now) -> tuple[Step, ...]:
    """Steps from ``now`` back to the state in the binding."""
    steps: list[Step] = []
    address = binding.address
    moved = now.driver != binding.driver
    if moved and now.driver is not None:
        steps.append(Unbind(address, now.driver))
    if now.override != binding.override:
        steps.append(SetOverride(address, binding.override))
    if moved and binding.driver is not None:
        steps.append(Probe(address, binding.driver))
    if binding.persistence:
        steps.append(SetPersistence(address, on=True))
    return tuple(steps)
