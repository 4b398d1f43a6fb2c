"""The server and its host: health, capabilities, resources (§2.1, §2.10)."""

from __future__ import annotations

from hypeman.resources.types import MemoryReclaimRequest, MemoryReclaimResponse, Resources
from hypeman.server.api import Routes
from hypeman.server.services import Services
from hypeman.server.types import Capabilities, Health
from hypeman.telemetry.findings import Finding
from hypeman.tokens import Scope

routes = Routes("host")

_OK = Health()


@routes.get("/health", None)
async def health(services: Services) -> Health:
    """Whether the server answers."""
    return _OK


@routes.get("/capabilities", Scope.RESOURCE_READ)
async def get_capabilities(services: Services) -> Capabilities:
    """What this server can do on this host."""
    return await services.capabilities.get()


@routes.get("/resources", Scope.RESOURCE_READ)
async def get_resources(services: Services) -> Resources:
    """The host's resources and their allocation."""
    return await services.resources.get()


@routes.get("/doctor", Scope.RESOURCE_WRITE)
async def examine_host(services: Services) -> list[Finding]:
    """Extension: what the host can do, what is missing, and how to fix it, as `hypeman doctor` reports it.

    Takes up to ten seconds. Findings name files and settings of the host, so reading them needs resource:write.
    """
    return await services.doctor.examine()


@routes.post("/resources/memory/reclaim", Scope.RESOURCE_WRITE, fails=(400,))
async def reclaim_memory(services: Services, body: MemoryReclaimRequest) -> MemoryReclaimResponse:
    """Have the guests temporarily lend unneeded memory to the host."""
    return await services.instances.reclaim_memory(body)
