"""Who causes a change: set where a call is authenticated, read where the change is recorded.

    set_actor(Actor("alice", address="10.0.0.5"))     # for the task of this request and those that it starts
    with acting(None):                                # for a block
        ...

It travels in a context variable, so that no service has to hand it on; a queued command carries it to the task
that runs it. A long-lived task runs in ``acting(None)``: what it does on its own has no actor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from msgspec import UNSET, Struct, UnsetType


class Actor(Struct, frozen=True):
    """Who caused a change."""

    subject: str
    """The token's subject; ``local`` for a caller that the unix socket's permissions admit."""
    address: str | UnsetType = UNSET
    """IP address of a caller over TCP."""
    uid: int | UnsetType = UNSET
    """User id of a caller over the unix socket."""
    request_id: str | UnsetType = UNSET
    """As in the access log and the header ``X-Request-Id``."""
    call: str | UnsetType = UNSET
    """The same for all events of one call with an ``Idempotency-Key``."""


_current: ContextVar[Actor | None] = ContextVar("actor", default=None)


def current_actor() -> Actor | None:
    """The actor of the running task; None if the server acts on its own."""
    return _current.get()


def set_actor(actor: Actor | None) -> None:
    """Attribute what this task changes from now on to ``actor``."""
    _current.set(actor)


@contextmanager
def acting(actor: Actor | None) -> Iterator[None]:
    """Within the block, changes are attributed to ``actor``."""
    token = _current.set(actor)
    try:
        yield
    finally:
        _current.reset(token)
