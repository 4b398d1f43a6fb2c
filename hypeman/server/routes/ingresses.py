"""Ingresses (§2.9)."""

from __future__ import annotations

from hypeman.ingress.types import CreateIngressRequest, Ingress
from hypeman.server.api import Page, Routes
from hypeman.server.routes.queries import TagQuery
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("ingresses")

_PEM = "application/x-pem-file"


@routes.get("/ingresses", Scope.INGRESS_READ)
async def list_ingresses(services: Services, query: TagQuery) -> list[Ingress]:
    """All ingresses, oldest first."""
    return list(await services.ingresses.list(tags=query.tags))


@routes.post("/ingresses", Scope.INGRESS_WRITE, status=201, fails=(400, 409))
async def create_ingress(services: Services, body: CreateIngressRequest) -> Ingress:
    """Route requests for host names to instances.

    The server listens on the rules' ports. A host name and port belong to one ingress.
    """
    return await services.ingresses.create(body)


@routes.get("/ingresses/{id}", Scope.INGRESS_READ, fails=(404, 409))
async def get_ingress(services: Services, id: str) -> Ingress:
    """One ingress, by id, name or the beginning of its id."""
    return await services.ingresses.get(id)


@routes.delete("/ingresses/{id}", Scope.INGRESS_DELETE, fails=(404, 409))
async def delete_ingress(services: Services, id: str) -> None:
    """Delete an ingress.

    Its open connections end.
    """
    await services.ingresses.delete(id)


@routes.get("/ingress/ca.pem", Scope.INGRESS_READ, media_type=_PEM)
async def get_ingress_ca(services: Services) -> Page:
    """The certificate of the internal CA, which certifies hosts without a public name."""
    return Page((await services.ingresses.internal_root()).encode(), _PEM)
