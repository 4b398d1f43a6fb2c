"""The egress path as operators see it: the CA, the policy of an instance, its requests.

Extension of the original's contract. Nothing here discloses a credential's value, a path or a query.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from hypeman.egress.types import EgressPolicy
from hypeman.fields import Count
from hypeman.server.api import SSE_HEADERS, EventStream, Page, Routes
from hypeman.server.events import JsonEvents
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("egress")

_PEM = "application/x-pem-file"


class RequestsQuery(Struct, frozen=True, kw_only=True):
    tail: Annotated[Count, Meta(description="Requests from before; the server keeps the last 100 in memory")] = 100
    follow: bool = False


@routes.get("/egress/ca.pem", Scope.RESOURCE_READ, media_type=_PEM)
async def get_egress_ca(services: Services) -> Page:
    """The certificate of the authority that guests with mediated egress trust."""
    return Page(services.egress.ca_pem(), _PEM)


@routes.get("/instances/{id}/egress", Scope.INSTANCE_READ, fails=(404, 409))
async def get_egress_policy(services: Services, id: str) -> EgressPolicy:
    """The egress policy of an instance, without credential values."""
    return services.egress.policy(id)


@routes.get(
    "/instances/{id}/egress/requests",
    Scope.INSTANCE_READ,
    fails=(404, 409),
    media_type="text/event-stream",
    unlimited=True,
    headers=SSE_HEADERS,
)
async def get_egress_requests(services: Services, id: str, query: RequestsQuery) -> EventStream:
    """Mediated requests of an instance as server-sent events.

    Each event is one request that ended, allowed or denied, as a JSON object: time, kind (request, passed_through:
    carried unread, refused: a connection that never became a request), host, port, method, status (0: none), reason
    (ok, or the code that the denied client was given), injected, credentials (names), bytes_up, bytes_down, ms, http
    (major version).
    """
    return EventStream(JsonEvents(await services.egress.requests(id, tail=query.tail, follow=query.follow)))
