"""Device types: API (the contract's §2.8), host scan and stored records."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.fields import TagMap, Timestamp

PciAddress = Annotated[
    str,
    Meta(
        description="hhhh:hh:hh.h, hexadecimal",
        examples=["0000:a2:00.0"],
        extra_json_schema={"pattern": "^[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\\.[0-7]$"},
    ),
]


# ── The wire ────────────────────────────────────────────────────────────────────────────────────


class DeviceType(enum.StrEnum):
    GPU = "gpu"
    PCI = "pci"


class CreateDeviceRequest(Struct, frozen=True, kw_only=True):
    """Register a PCI function for passthrough."""

    pci_address: PciAddress
    name: Annotated[str | None, Meta(description="Letters, digits, '_', '.' and '-'; default: from the address")] = None
    tags: TagMap = {}


class Device(Struct, frozen=True, kw_only=True):
    """A registered PCI function."""

    id: str
    type: DeviceType
    pci_address: str
    vendor_id: str
    device_id: str
    iommu_group: int
    bound_to_vfio: Annotated[bool, Meta(description="As of now")]
    created_at: Timestamp
    name: str
    attached_to: Annotated[
        str | None, Meta(description="Instance that has it. A stopped instance keeps its devices until it is deleted")
    ] = None
    missing: Annotated[bool | UnsetType, Meta(description="True where the host has no such function now")] = UNSET
    tags: TagMap | UnsetType = UNSET


class AvailableDevice(Struct, frozen=True, kw_only=True):
    """A PCI function of the host that can be passed through."""

    pci_address: str
    vendor_id: str
    device_id: str
    iommu_group: int
    vendor_name: str | UnsetType = UNSET
    device_name: str | UnsetType = UNSET
    current_driver: str | None = None
    reason: Annotated[
        str | UnsetType, Meta(description="Why it cannot be passed through; only where all were asked for")
    ] = UNSET


# ── What is seen of the machine ─────────────────────────────────────────────────────────────────


class PciFunction(Struct, frozen=True):
    """One function as scanned. Numbers are -1 if the host does not report them."""

    address: str
    vendor: int
    device: int
    class_code: int
    subsystem_vendor: int
    subsystem_device: int
    driver: str | None
    iommu_group: int
    numa_node: int
    physfn: str | None
    """Physical function of a virtual one."""
    total_vfs: int
    reset_methods: str

    @property
    def is_bridge(self) -> bool:
        return self.class_code >> 16 == 0x06

    @property
    def is_gpu(self) -> bool:
        """VGA or 3D controller."""
        return self.class_code >> 8 in (0x0300, 0x0302)

    @property
    def type(self) -> DeviceType:
        return DeviceType.GPU if self.is_gpu else DeviceType.PCI


class VgpuKind(enum.StrEnum):
    MDEV = "mdev"
    """Created by writing a UUID into the parent's type."""
    VENDOR = "vendor"
    """The type is written into a virtual function (NVIDIA's driver on kernels 6.8 and newer)."""


class VgpuType(Struct, frozen=True):
    """A vGPU type that a parent offers."""

    id: str
    name: str
    framebuffer_mb: int
    available: int
    """Number that the parent can currently still create."""


class VgpuParent(Struct, frozen=True):
    """A PCI function (or another device) that can be divided."""

    address: str
    gpu: str
    """The physical card: the address itself, or that of its physical function."""
    kind: VgpuKind
    types: tuple[VgpuType, ...]
    made: tuple[str, ...]
    """UUIDs of existing mdevs; for the vendor kind the id of the type that is set, if any."""


# ── What is stored ──────────────────────────────────────────────────────────────────────────────


class DeviceRecord(Struct, frozen=True, kw_only=True):
    """A registration and the device's owner."""

    id: str
    name: str
    pci_address: str
    type: DeviceType
    vendor_id: str
    device_id: str
    iommu_group: int
    """As of registration; numbers may change when the host boots."""
    created_at: Timestamp
    tags: dict[str, str] = {}
    attached_to: str | None = None
    position: int = 0
    """Position among the devices of that instance."""


class Binding(Struct, frozen=True, kw_only=True):
    """A function's state before we took it, written before the first change and removed after the
    last one was undone. While it exists, no other instance gets the function."""

    address: str
    instance_id: str
    driver: str | None
    override: str
    """Previous ``driver_override``; empty for none."""
    persistence: bool
    """NVIDIA's persistence mode was on for it."""
    boot_id: str
    """After a reboot the changes are gone and need not be undone."""
    leaving: bool = False
    """Is being given back, and was not yet when this was written."""


class VgpuRecord(Struct, frozen=True, kw_only=True):
    """An instance's claim on a slot, written before the vGPU is made."""

    instance_id: str
    uuid: str
    profile: str
    type_id: str
    parent: str
    kind: VgpuKind
    made: bool = False
    """May exist on the machine: set before it is made, cleared after it was removed."""
    leaving: bool = False
    """Is being removed, and was not yet when this was written."""
    owned: bool = True
    """The instance still needs the slot; if false, the claim is removed with the vGPU."""
