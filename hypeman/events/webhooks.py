"""Delivers events to webhooks: at least once, in order per hook, from a cursor that survives restarts.

The queue of a hook is the event log itself, so that an unreachable receiver costs neither memory nor the others. An
event that is not accepted (2xx) is repeated with backoff and holds up those behind it, until ``retry_hours`` have
passed; then it is skipped, which is logged and counted. If the log has dropped events before they were delivered,
delivery continues with the oldest one, which is logged and counted as well.

A receiver's address is checked when it is connected to, so that no name leads elsewhere later: public ones only, and
private and loopback ones with ``allow_private``; link-local ones (metadata services) never. Redirects are failures.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from functools import partial

import httpcore
import msgspec
import trio

from hypeman import __version__
from hypeman.config import WebhookConfig
from hypeman.errors import HypemanError, cause_of
from hypeman.events import log
from hypeman.events.service import Events
from hypeman.events.signing import key_of, signed_headers
from hypeman.events.types import CursorGone, Event, EventFilter, Kind
from hypeman.host.checked_backend import CheckedBackend, is_allowed
from hypeman.host.tls import client_context
from hypeman.store import Store, Table
from hypeman.telemetry import metrics

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds between attempts; each pause is twice the previous one."""
_GONE = 410

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class WebhookRow(msgspec.Struct, frozen=True):
    cursor: int
    """Of the last event that was delivered or skipped."""


WEBHOOKS: Table[WebhookRow] = Table("webhooks", WebhookRow)


class WebhookError(HypemanError):
    """A webhook's configuration cannot be used."""


class _Refused(Exception):
    """Not delivered; ``pause`` is the least seconds to wait, if the receiver named them."""

    def __init__(self, reason: str, *, pause: float = 0.0, gone: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause
        self.gone = gone


class Webhooks:
    """All configured webhooks. ``run`` in a nursery. Raises WebhookError for a secret or CA file that is unusable."""

    def __init__(self, store: Store, events: Events, configured: Mapping[str, WebhookConfig]) -> None:
        self._store = store
        self._hooks = [_Hook(store, events, name, config) for name, config in configured.items()]

    async def run(self) -> None:
        names = {hook.name for hook in self._hooks}
        await self._store.write(
            lambda txn: [txn.delete(WEBHOOKS, name) for name in list(txn.keys(WEBHOOKS)) if name not in names]
        )
        async with trio.open_nursery() as nursery:
            for hook in self._hooks:
                nursery.start_soon(hook.run)


class _Hook:
    def __init__(self, store: Store, events: Events, name: str, config: WebhookConfig) -> None:
        self.name = name
        self._store = store
        self._events = events
        self._config = config
        self._wanted = EventFilter(types=config.types, tags=config.tags)
        if unknown := [one for one in config.types if one.partition(".")[0] not in list(Kind)]:
            raise WebhookError(f"events.webhooks.{name}.types: there are no events of type {', '.join(unknown)}")
        try:
            self._key, self._tls = key_of(config.secret), client_context(config.ca_file)
        except (OSError, ValueError) as error:
            raise WebhookError(f"events.webhooks.{name} cannot be used: {error}") from None

    async def run(self) -> None:
        row = self._store.read(lambda txn: txn.get(WEBHOOKS, self.name))
        cursor = row.cursor if row is not None else self._events.last  # a new hook gets what is new
        self._store.write_soon(lambda txn: txn.put(WEBHOOKS, self.name, WebhookRow(cursor)))
        backend = CheckedBackend(partial(is_allowed, private=self._config.allow_private))
        async with httpcore.AsyncConnectionPool(self._tls, max_connections=1, network_backend=backend) as pool:
            while True:
                try:
                    await self._follow(pool, cursor)
                    return
                except CursorGone as error:
                    cursor = self._store.read(log.head).first - 1
                    _log.warning("webhook %s: events were dropped before they were delivered: %s", self.name, error)
                    metrics.webhook_deliveries.labels(self.name, "lost").inc()
                except Exception:  # a bug here must not end the server
                    _log.exception("webhook %s failed", self.name)
                    await trio.sleep(LONGEST_PAUSE)
                    row = self._store.read(lambda txn: txn.get(WEBHOOKS, self.name))
                    cursor = row.cursor if row is not None else cursor

    async def _follow(self, pool: httpcore.AsyncConnectionPool, cursor: int) -> None:
        """Deliver until the receiver is gone for good. Raises CursorGone."""
        follower = self._events.follow(cursor, self._wanted)
        async for batch in follower:
            for event in batch:
                if not await self._deliver(pool, event):
                    return
                self._keep(event.cursor)
            if not batch:
                self._keep(follower.cursor)

    def _keep(self, cursor: int) -> None:
        self._store.write_soon(lambda txn: txn.put(WEBHOOKS, self.name, WebhookRow(cursor)))

    async def _deliver(self, pool: httpcore.AsyncConnectionPool, event: Event) -> bool:
        """Deliver ``event``, or skip it after ``retry_hours``; False if the receiver asks for no more events (410)."""
        body = _encode(event)
        message_id = f"{event.cursor}-{int(event.time.timestamp() * 1000)}"
        give_up = trio.current_time() + self._config.retry_hours * 3600
        pause = FIRST_PAUSE
        while True:
            try:
                await self._post(pool, message_id, body)
                metrics.webhook_deliveries.labels(self.name, "delivered").inc()
                return True
            except _Refused as refusal:
                outcome = "gone" if refusal.gone else "skipped" if trio.current_time() >= give_up else "failed"
                metrics.webhook_deliveries.labels(self.name, outcome).inc()
                _log.warning("webhook %s: event %d %s: %s", self.name, event.cursor, outcome, refusal)
                if outcome != "failed":
                    return not refusal.gone
                await trio.sleep(max(refusal.pause, pause * random.uniform(0.8, 1.2)))  # noqa: S311 - only spreads load
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _post(self, pool: httpcore.AsyncConnectionPool, message_id: str, body: bytes) -> None:
        """One attempt. Raises _Refused."""
        headers: dict[bytes | str, bytes | str] = {
            "content-type": "application/json",
            "user-agent": f"Hypeman/{__version__}",
        }
        headers.update(signed_headers(self._key, message_id, int(time.time()), body).items())
        url = self._config.url
        try:
            with trio.fail_after(self._config.timeout):
                async with pool.stream("POST", url, headers=headers, content=body) as response:
                    status, headers = response.status, dict(response.headers)
        except trio.TooSlowError:
            raise _Refused(f"no answer within {self._config.timeout:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise _Refused(cause_of(error)) from None
        if not 200 <= status < 300:
            after = headers.get(b"retry-after", b"")
            pause = min(float(after), LONGEST_PAUSE) if after.isdigit() else 0.0
            raise _Refused(f"status {status}", pause=pause, gone=status == _GONE)
