"""What instances are connected to: volumes, devices, ingresses; and the host's capacity."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field

import trio
from msgspec import UNSET

from hypeman.devices.types import AvailableDevice, CreateDeviceRequest, Device, DeviceType
from hypeman.errors import (
    Conflict,
    InUse,
    InvalidRequest,
    NotFound,
)
from hypeman.ids import new_id, tags_match
from hypeman.ingress.types import CertificateState, CreateIngressRequest, Ingress, IngressCertificate
from hypeman.ingress.validate import check_request
from hypeman.resources.types import (
    ResourceAllocation,
    Resources,
    ResourceStatus,
)
from hypeman.server.types import (
    Capabilities,
    DefaultRuntime,
    HostPlatform,
    ImageCapabilities,
    NetworkCapabilities,
    Runtime,
    ServerVersion,
)
from hypeman.telemetry.findings import Finding, Verdict
from hypeman.volumes.types import CreateVolumeRequest, Volume
from tests.fakes.services.common import NOW, Tags
from tests.fakes.services.instances import FakeInstances


@dataclass
class FakeVolumes:
    volumes: dict[str, Volume] = field(default_factory=dict)
    archives: dict[str, bytes] = field(default_factory=dict)
    reads_slowly: trio.Event | None = None
    """Where set, an archive is read only after this."""

    async def list(self, *, tags: Tags) -> Sequence[Volume]:
        return [volume for volume in self.volumes.values() if tags_match(volume.tags or {}, tags)]

    async def get(self, ref: str) -> Volume:
        for volume in self.volumes.values():
            if ref in (volume.id, volume.name):
                return volume
        raise NotFound(f"volume {ref} is not here")

    async def create(self, request: CreateVolumeRequest) -> Volume:
        volume = Volume(
            id=request.id or new_id(),
            name=request.name,
            size_gb=request.size_gb,
            created_at=NOW,
            tags=request.tags or UNSET,
        )
        if volume.id in self.volumes:
            raise Conflict(f"there is a volume {volume.id} already", code="already_exists")
        self.volumes[volume.id] = volume
        return volume

    async def create_from_archive(self, request: CreateVolumeRequest, chunks: AsyncIterable[bytes]) -> Volume:
        if self.reads_slowly is not None:
            await self.reads_slowly.wait()
        volume = await self.create(request)
        self.archives[volume.id] = b"".join([chunk async for chunk in chunks])
        return volume

    async def delete(self, ref: str) -> None:
        volume = await self.get(ref)
        if volume.attachments:
            raise Conflict(f"volume {ref} is attached")
        del self.volumes[volume.id]


@dataclass
class FakeDevices:
    devices: dict[str, Device] = field(default_factory=dict)
    free: list[AvailableDevice] = field(default_factory=list)
    present: set[str] = field(default_factory=lambda: {"0000:03:00.0"})
    """Addresses that can be registered."""

    def list(self, tags: Tags) -> Sequence[Device]:
        return list(self.devices.values())

    async def available(self, *, everything: bool) -> Sequence[AvailableDevice]:
        return self.free if everything else [device for device in self.free if device.reason is UNSET]

    async def register(self, request: CreateDeviceRequest) -> Device:
        if request.pci_address not in self.present:
            raise NotFound(f"there is no {request.pci_address}", code="device_not_found")
        return self.add(request.name or request.pci_address, request.pci_address)

    def add(self, name: str, address: str = "0000:02:00.0") -> Device:
        """A device that is registered."""
        device = Device(
            id=new_id(), type=DeviceType.GPU, pci_address=address, vendor_id="10de", device_id="2204", iommu_group=1,
            bound_to_vfio=False, created_at=NOW, name=name,
        )  # fmt: skip
        self.devices[device.id] = device
        return device

    def get(self, ref: str) -> Device:
        for device in self.devices.values():
            if ref in (device.id, device.name):
                return device
        raise NotFound(f"device {ref} is not here")

    async def delete(self, ref: str) -> None:
        device = self.get(ref)
        if device.attached_to:
            raise InUse(f"device {ref} is attached to {device.attached_to}")
        del self.devices[device.id]


@dataclass
class FakeIngresses:
    instances: FakeInstances
    ingresses: dict[str, Ingress] = field(default_factory=dict)

    async def list(self, *, tags: Tags) -> Sequence[Ingress]:
        return [ingress for ingress in self.ingresses.values() if tags_match(ingress.tags or {}, tags)]

    async def get(self, ref: str) -> Ingress:
        for ingress in self.ingresses.values():
            if ref in (ingress.id, ingress.name):
                return ingress
        raise NotFound(f"ingress {ref} is not here")

    async def create(self, request: CreateIngressRequest) -> Ingress:
        record = check_request(request, lambda ref: self.instances.find(ref).name, refuse_tls, NOW)
        if any(ingress.name == record.name for ingress in self.ingresses.values()):
            raise Conflict(f"there is an ingress {record.name} already", code="already_exists")
        certificates = tuple(
            IngressCertificate(hostname=host, state=CertificateState.VALID, source="internal", not_after=NOW)
            for host in sorted(record.tls_hosts)
        )
        made = Ingress(
            id=record.id,
            name=record.name,
            rules=record.rules,
            created_at=NOW,
            tags=record.tags or UNSET,
            certificates=certificates or UNSET,
        )
        self.ingresses[made.id] = made
        return made

    async def delete(self, ref: str) -> None:
        del self.ingresses[(await self.get(ref)).id]

    async def internal_root(self) -> str:
        return "-----BEGIN CERTIFICATE-----\n"


def refuse_tls(hostname: str) -> None:
    if not hostname.endswith(".internal"):
        raise InvalidRequest(f"tls for {hostname}: no source of certificates", code="config_validation_failed")


class FakeResources:
    async def get(self) -> Resources:
        def status(kind: str, capacity: int) -> ResourceStatus:
            return ResourceStatus(
                type=kind,
                capacity=capacity,
                effective_limit=capacity,
                allocated=0,
                available=capacity,
                oversub_ratio=1.0,
                source="detected",
            )

        return Resources(
            cpu=status("cpu", 2),
            memory=status("memory", 8 * 2**30),
            disk=status("disk", 2**40),
            network=status("network", 125_000_000),
            allocations=(ResourceAllocation(instance_id="abc", instance_name="web", cpu=1, memory_bytes=2**30),),
        )


class FakeDoctor:
    async def examine(self) -> list[Finding]:
        return [
            Finding(name="rights", verdict=Verdict.OK, message="running as root"),
            Finding(name="kvm", verdict=Verdict.WARN, message="there is no /dev/kvm", remedy="modprobe kvm_intel"),
        ]


class FakeCapabilities:
    async def get(self) -> Capabilities:
        return Capabilities(
            server=ServerVersion("1234abcd", "0.3.0"),
            host=HostPlatform("linux", "amd64"),
            default_runtime=DefaultRuntime("qemu", True),
            runtimes=(Runtime("qemu", True, ("standby", "fork")),),
            network=NetworkCapabilities("bridge", False, "10.100.0.1", "10.100.0.0/16"),
            images=ImageCapabilities(("linux/amd64",), "linux/amd64"),
            features=("instances", "images"),
        )
