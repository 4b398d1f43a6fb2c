"""What instances used: the ledger. Extension of the original's contract."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from hypeman.errors import InvalidRequest
from hypeman.fields import Count, TagMap
from hypeman.metering.types import Query, UsageBy, UsageReport, UsageVerification
from hypeman.server.api import Routes
from hypeman.server.moments import parse_moment
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("usage")

_Time = Annotated[
    str,
    Meta(
        max_length=64, description="RFC 3339 time, or a duration before now", examples=["2026-01-01T00:00:00Z", "720h"]
    ),
]


class UsageQuery(Struct, frozen=True, kw_only=True):
    since: Annotated[_Time, Meta(description="Periods that begin then or later; default: everything kept")] = ""
    until: Annotated[_Time, Meta(description="Periods that begin before it; default: now")] = ""
    by: UsageBy = UsageBy.INSTANCE
    tag: Annotated[str, Meta(max_length=128, description="Key of the tag, with by=tag", examples=["team"])] = ""
    instance: Annotated[
        str,
        Meta(max_length=256, description="Id or name of an instance, which may have been deleted", examples=["web"]),
    ] = ""
    tags: TagMap = {}


class VerifyQuery(Struct, frozen=True, kw_only=True):
    block: Annotated[Count, Meta(description="Number of a block whose hash was noted; 0: none", examples=[12])] = 0
    hash: Annotated[
        str,
        Meta(pattern="^([0-9a-f]{64})?$", description="Of that block; the two belong together", examples=["5e" * 32]),
    ] = ""


@routes.get("/usage", Scope.INSTANCE_READ, fails=(400,))
async def get_usage_report(services: Services, query: UsageQuery) -> UsageReport:
    """What instances used, also deleted ones, by instance, by the values of a tag, or by day.

    The ledger has periods of an hour, and of a day once they are old; the current one grows with each sample. Periods
    count as a whole. Tags and name are those at the end of a period.
    """
    wanted = Query(
        since=parse_moment(query.since, "since").timestamp() if query.since else 0.0,
        until=parse_moment(query.until, "until").timestamp() if query.until else float("inf"),
        instance=query.instance,
        tags=query.tags,
        by=query.by,
        tag=query.tag,
    )
    return await services.metering.report(wanted)


@routes.get("/usage/verify", Scope.INSTANCE_READ, fails=(400,))
async def verify_usage(services: Services, query: VerifyQuery) -> UsageVerification:
    """Check the ledger: every block follows the one before it, and has the entries that were written.

    Note the answer's last and hash outside of this host. With block and hash, the check also shows that nothing up to
    that block was changed since.
    """
    if bool(query.block) != bool(query.hash):
        raise InvalidRequest("block and hash belong together")
    return await services.metering.verify(query.block, query.hash)
