"""The current capabilities of this server on this host (§2.1)."""

from __future__ import annotations

from msgspec import UNSET

from hypeman import API_VERSION, __version__, architecture
from hypeman.config import Config
from hypeman.hypervisor.catalog import Catalog, features
from hypeman.images.service import Images
from hypeman.network.service import Network
from hypeman.server.types import (
    Capabilities,
    DefaultRuntime,
    HostPlatform,
    ImageCapabilities,
    NetworkCapabilities,
    Runtime,
    ServerVersion,
)

FEATURES = (
    "instances",
    "images",
    "volumes",
    "exec",
    "logs",
    "devices",
    "ports",
    "ingress",
    "restart-policy",
    "health-check",
    "snapshot-schedule",
    "auto-standby",
)


class CapabilityView:
    """Implements ``CapabilityService``. A hypervisor that is still being probed counts as unavailable."""

    def __init__(self, config: Config, catalog: Catalog, network: Network, images: Images) -> None:
        self._config = config
        self._catalog = catalog
        self._network = network
        self._images = images

    async def get(self) -> Capabilities:
        default = self._catalog.default()
        drivers = self._catalog.drivers
        image_platform = self._images.platform(None)
        return Capabilities(
            server=ServerVersion(version=__version__, api_version=API_VERSION),
            host=HostPlatform(os="linux", arch=architecture.HOST.name),
            default_runtime=DefaultRuntime(
                name=default.value,
                available=default in drivers and drivers[default].capabilities.available,
            ),
            runtimes=tuple(
                Runtime(kind.value, driver.capabilities.available, features(driver.capabilities))
                for kind, driver in sorted(drivers.items())
            ),
            network=NetworkCapabilities(
                model="bridge",
                guest_to_guest=self._config.network.guest_to_guest,
                gateway=str(self._network.subnet.gateway) or UNSET,
                subnet=str(self._network.subnet.network),
            ),
            images=ImageCapabilities(platforms=(image_platform,), default_platform=image_platform),
            features=FEATURES,
        )
