"""Why a function can or cannot be passed through. Pure: the host's state is passed in as values.

An IOMMU group is the smallest unit that can be passed through: its members can access each other's
memory bypassing the IOMMU. So one obstacle in a group applies to all its endpoints. Bridges in it
are left alone if only the kernel's port driver (or none) is bound to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hypeman.devices.types import PciFunction
from hypeman.errors import InvalidRequest

VFIO_DRIVER = "vfio-pci"

_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_HARMLESS_ON_A_BRIDGE = (None, "pcieport", "pci-stub", VFIO_DRIVER)
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_MAX_NAME = 128

Functions = Mapping[str, PciFunction]


def parse_address(text: str) -> str:
    """``text`` in lower case if it is ``hhhh:hh:hh.h``, else InvalidRequest ``invalid_pci_address``."""
    address = text.lower()
    if not _ADDRESS.fullmatch(address):
        raise InvalidRequest(
            f"{text!r} is not a PCI address; write domain:bus:device.function, as in 0000:a2:00.0",
            code="invalid_pci_address",
        )
    return address


def check_device_name(name: str) -> str:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"device name {name!r} must be 2 to {_MAX_NAME} letters, digits, '_', '.' or '-', "
            "and begin with a letter or digit",
            code="invalid_name",
        )
    return name


def default_name(address: str) -> str:
    return "pci-" + address.replace(":", "-").replace(".", "-")


def group_members(functions: Functions, group: int) -> tuple[PciFunction, ...]:
    return tuple(f for f in functions.values() if f.iommu_group == group)


def endpoints(functions: Functions, group: int) -> tuple[PciFunction, ...]:
    """The members of a group that are bound together, sorted by address."""
    return tuple(f for f in group_members(functions, group) if not f.is_bridge)


def obstacles(functions: Functions, held: Mapping[str, str], divided: Iterable[str]) -> dict[str, str]:
    """For each function that cannot be passed through, the reason.

    ``held``: how the host uses a function ("holds /"); ``divided``: the parents of vGPUs.
    """
    own = {f.address: reason for f in functions.values() if (reason := _own_obstacle(f, held))}
    for address in divided:
        own.setdefault(address, "its driver divides it into vGPUs (use gpu.profile)")
    with_virtual = {f.physfn for f in functions.values() if f.physfn is not None}
    for address in with_virtual & functions.keys():
        own.setdefault(address, "has virtual functions (pass those, or remove them first)")
    blocked: dict[int, str] = {}
    for f in functions.values():
        reason = _group_obstacle(f, held, own)
        if reason:
            blocked.setdefault(f.iommu_group, reason)
    found = {}
    for f in functions.values():
        reason = own.get(f.address) or blocked.get(f.iommu_group, "")
        if reason:
            found[f.address] = reason
    return found


def _own_obstacle(f: PciFunction, held: Mapping[str, str]) -> str:
    if f.is_bridge:
        return "is a bridge"
    if f.address in held:
        return f"in use by the host: {held[f.address]}"
    if f.iommu_group < 0:
        return "has no IOMMU group (is the IOMMU switched on in firmware and kernel?)"
    if not _ADDRESS.fullmatch(f.address):
        return "is in a domain above ffff, behind a storage controller that the host drives"
    return ""


def _group_obstacle(f: PciFunction, held: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Obstacle that ``f`` is for the others in its group."""
    if f.iommu_group < 0:
        return ""
    shared = f"shares IOMMU group {f.iommu_group} with {f.address}"
    if f.address in held:
        return f"{shared}, in use by the host: {held[f.address]}"
    if f.is_bridge:
        return "" if f.driver in _HARMLESS_ON_A_BRIDGE else f"{shared}, a bridge driven by {f.driver}"
    return f"{shared}, which {own[f.address]}" if f.address in own else ""
