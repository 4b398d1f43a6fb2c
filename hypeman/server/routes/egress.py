"""The egress path as operators see it: the CA, the policy of an instance, its requests.

Extension of the original's contract. Nothing here discloses a credential's value, a path or a query.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from hypeman.egress.types import EgressApproval, EgressCheck, EgressDecision, EgressPolicy, EgressProposal
from hypeman.errors import InvalidRequest
from hypeman.fields import Count
from hypeman.server.api import SSE_HEADERS, EventStream, Page, Routes
from hypeman.server.events import JsonEvents
from hypeman.server.services import Services
from hypeman.tokens import Scope
from hypeman.units import parse_duration

routes = Routes("egress")

_PEM = "application/x-pem-file"
_MAX_DECISION = 30 * 86400.0
"""Seconds."""


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


class CheckQuery(Struct, frozen=True, kw_only=True):
    url: Annotated[str, Meta(max_length=4096, examples=["https://api.example.com/v1/models"])]
    method: Annotated[str, Meta(max_length=32)] = "GET"


@routes.get("/instances/{id}/egress/check", Scope.INSTANCE_READ, fails=(404, 409))
async def check_egress(services: Services, id: str, query: CheckQuery) -> EgressCheck:
    """What the instance's rules say of a request. Nothing is sent and no name is looked up."""
    return services.egress.check(id, query.url, query.method)


@routes.get("/instances/{id}/egress/proposal", Scope.INSTANCE_READ, fails=(404, 409))
async def get_egress_proposal(services: Services, id: str) -> EgressProposal:
    """The narrowest rules that cover what the instance reached since the server started.

    Methods are known of what was decrypted, paths where a rule has them recorded. Refused requests do not count.
    """
    return services.egress.proposal(id)


@routes.get("/instances/{id}/egress/approvals", Scope.INSTANCE_READ, fails=(404, 409))
async def list_egress_approvals(services: Services, id: str) -> list[EgressApproval]:
    """Requests that a rule with action ask holds, oldest first."""
    return list(services.egress.approvals(id))


@routes.get("/egress/approvals", Scope.INSTANCE_READ)
async def list_all_egress_approvals(services: Services) -> list[EgressApproval]:
    """Requests of all instances that rules with action ask hold, oldest first."""
    return list(services.egress.approvals())


@routes.post("/instances/{id}/egress/approvals/{approval}/approve", Scope.INSTANCE_WRITE, fails=(400, 404, 409))
async def approve_egress(
    services: Services, id: str, approval: str, body: EgressDecision | None = None
) -> EgressApproval:
    """Let the requests proceed."""
    return await services.egress.decide(id, approval, allow=True, seconds=_seconds(body))


@routes.post("/instances/{id}/egress/approvals/{approval}/deny", Scope.INSTANCE_WRITE, fails=(400, 404, 409))
async def deny_egress(services: Services, id: str, approval: str, body: EgressDecision | None = None) -> EgressApproval:
    """Refuse the requests with 403 not_approved."""
    return await services.egress.decide(id, approval, allow=False, seconds=_seconds(body))


def _seconds(decision: EgressDecision | None) -> float:
    if decision is None or decision.for_ is None:
        return 0.0
    seconds = parse_duration(decision.for_, code="invalid_duration")
    if seconds > _MAX_DECISION:
        raise InvalidRequest("for must be at most 30 days; write a rule instead", code="invalid_duration")
    return seconds


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
