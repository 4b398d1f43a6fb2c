"""Life-cycle changes of all objects. Extension of the original's contract.

A caller sees the events of those kinds of objects that its token may read.
"""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta, Struct

from hypeman.errors import Forbidden, InvalidRequest
from hypeman.events.types import READ_SCOPE, Event, EventFilter, Kind
from hypeman.fields import TagMap
from hypeman.server.api import SSE_HEADERS, Context, EventStream, Routes
from hypeman.server.events import LoggedEvents
from hypeman.server.moments import parse_moment
from hypeman.server.services import EventService, Services
from hypeman.tokens import Caller, has_scope

routes = Routes("events")

_TYPE = re.compile(r"[a-z]+(\.[a-z_]+)?")
_CURSOR = re.compile(r"[0-9]{1,18}")
MAX_LIMIT = 10_000


class EventQuery(Struct, frozen=True, kw_only=True):
    since: Annotated[
        str | None,
        Meta(
            description="A cursor: what follows it; 0 is everything retained. Or a duration before now, or an RFC 3339 "
            "time. Default: new events only with follow, else everything retained",
            examples=["0", "4711", "10m", "2026-01-02T03:04:05Z"],
        ),
    ] = None
    follow: Annotated[bool, Meta(description="Server-sent events without end; false: a JSON list")] = True
    type: Annotated[
        str | None,
        Meta(
            description="Types, or kinds for all types of a kind, separated by commas",
            examples=["instance", "instance.state_changed,image.failed"],
        ),
    ] = None
    instance: Annotated[
        str | None, Meta(description="Id or name of an instance: events about it and what belongs to it")
    ] = None
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT, description="Maximum length of the list; not with follow")] = 1000
    tags: TagMap = {}


@routes.get(
    "/events",
    tuple(dict.fromkeys(READ_SCOPE.values())),
    fails=(410,),
    media_type="text/event-stream",
    unlimited=True,
    headers=SSE_HEADERS,
    request_headers={"Last-Event-ID": "Cursor of the last event received; replaces since"},
)
async def get_events(services: Services, query: EventQuery, context: Context) -> EventStream | list[Event]:
    """Life-cycle changes, as server-sent events or as a list.

    Each event has a cursor that grows, also across restarts; it is the id of the server-sent event, so that a client
    that reconnects continues where it was. An event is logged in the transaction that makes its change: none is lost
    or invented when the server is killed. Old events are dropped by number and age; a cursor that the log does not
    reach back to is refused with 410 cursor_gone, and a stream whose client falls behind that far ends with an event
    named error. Filters combine.
    """
    wanted = EventFilter(
        kinds=_kinds(context.caller), types=_types(query.type, context.caller), instance=query.instance or "",
        tags=query.tags,
    )  # fmt: skip
    since = context.header("Last-Event-ID") or query.since
    if query.follow:
        return EventStream(LoggedEvents(services.events.follow(_cursor(services.events, since, new=True), wanted)))
    return list(await services.events.list(_cursor(services.events, since, new=False), wanted, query.limit))


def _kinds(caller: Caller) -> frozenset[Kind]:
    return frozenset(kind for kind, scope in READ_SCOPE.items() if has_scope(caller, scope))


def _types(text: str | None, caller: Caller) -> tuple[str, ...]:
    """Raises InvalidRequest for a type that cannot exist, Forbidden for one that ``caller`` may not read."""
    types = tuple(text.split(",")) if text else ()
    for name in types:
        kind = name.partition(".")[0]
        if not _TYPE.fullmatch(name) or kind not in list(Kind):
            raise InvalidRequest(f"there is no event type {name[:80]!r}; kinds are {', '.join(Kind)}")
        if not has_scope(caller, READ_SCOPE[Kind(kind)]):
            raise Forbidden(f"the token lacks the scope {READ_SCOPE[Kind(kind)]}")
    return types


def _cursor(events: EventService, since: str | None, *, new: bool) -> int:
    """The cursor to continue after. Raises InvalidRequest ``invalid_since``."""
    if not since:
        return events.last if new else 0
    if _CURSOR.fullmatch(since):
        return int(since)
    return events.cursor_before(parse_moment(since, "since", others="a cursor, "))
