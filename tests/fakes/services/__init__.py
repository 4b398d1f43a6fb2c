"""Capabilities without anything below them: records in dictionaries, a shell that upper-cases.

They can answer everything that a route can ask, with every refusal that the contract knows. Tests change what they
hold directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypeman.server.services import RegistryService, Services
from hypeman.telemetry import traces
from tests.fakes.services.builds import FakeBuilds
from tests.fakes.services.egress import FakeEgress
from tests.fakes.services.images import EmptyRegistry, FakeImages, FakePushes
from tests.fakes.services.instances import FakeInstances, FakePolicies, FakeSnapshots
from tests.fakes.services.records import FakeEvents, FakeMetering
from tests.fakes.services.resources import (
    FakeCapabilities,
    FakeDevices,
    FakeDoctor,
    FakeIngresses,
    FakeResources,
    FakeVolumes,
)


@dataclass
class FakeWorld:
    """All fakes, with their own types; ``services`` is what the server gets."""

    log_directory: Path

    def __post_init__(self) -> None:
        self.images = FakeImages()
        self.instances = FakeInstances(self.log_directory)
        self.snapshots = FakeSnapshots(self.instances)
        self.policies = FakePolicies(self.instances)
        self.volumes = FakeVolumes()
        self.devices = FakeDevices()
        self.ingresses = FakeIngresses(self.instances)
        self.egress = FakeEgress(self.instances)
        self.events = FakeEvents()
        self.registry: RegistryService = EmptyRegistry()
        self.pushes = FakePushes()
        self.builds = FakeBuilds()
        self.metering = FakeMetering()

    @property
    def services(self) -> Services:
        return Services(
            images=self.images,
            instances=self.instances,
            snapshots=self.snapshots,
            policies=self.policies,
            volumes=self.volumes,
            devices=self.devices,
            ingresses=self.ingresses,
            egress=self.egress,
            events=self.events,
            resources=FakeResources(),
            capabilities=FakeCapabilities(),
            doctor=FakeDoctor(),
            registry=self.registry,
            pushes=self.pushes,
            builds=self.builds,
            traces=traces.RECORDER,
            metering=self.metering,
        )
