"""Sends traces and metrics to an OpenTelemetry collector: OTLP over HTTP, JSON.

Nothing waits for the collector. Spans that end are queued, at most ``queue`` of them; beyond that the oldest are
dropped and counted. They are sent in batches every ``FLUSH_SECONDS``, metrics every ``metrics_interval``. A batch that
the collector could not take for now (429, 502, 503, 504, no connection) is repeated with backoff, until
``GIVE_UP_SECONDS`` have passed; what it refuses is dropped. Encoding and compression are done in a thread.
"""

from __future__ import annotations

import gzip
import logging
import random
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import httpcore
import trio

from hypeman import __version__
from hypeman.config import OtlpConfig
from hypeman.errors import cause_of
from hypeman.telemetry import metrics, otlp
from hypeman.telemetry.traces import RECORDER, Span, Value
from hypeman.text import one_line

FLUSH_SECONDS = 2.0
BATCH = 512
"""Spans of one request."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between attempts; each pause is twice the previous one."""
GIVE_UP_SECONDS = 120.0
LAST_SECONDS = 2.0
"""How long the end of the server waits for the last batch."""
_MAX_ANSWER = 64 * 1024
"""Bytes of a response that are looked at."""
_LATER = frozenset((429, 502, 503, 504))
"""Statuses after which a request may be repeated."""

_log = logging.getLogger(__name__)


class _Later(Exception):
    """Not taken for now; ``pause`` is the least seconds to wait, if the collector named them."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Exporter:
    """``run`` in a nursery; it ends with its cancellation."""

    def __init__(self, config: OtlpConfig, tls: ssl.SSLContext) -> None:
        self._config = config
        self._tls = tls
        self._base = config.endpoint.rstrip("/")
        self._headers: dict[bytes | str, bytes | str] = {
            "content-type": "application/json",
            "content-encoding": "gzip",
            "user-agent": f"Hypeman/{__version__}",
        }
        self._headers.update(config.headers.items())
        self._resource: dict[str, Value] = {
            "service.name": "hypeman",
            "service.version": __version__,
            "host.name": socket.gethostname(),
            **config.attributes,
        }
        self._queue: deque[Span] = deque()
        self._failing = False
        self._started = time.time_ns()

    def offer(self, span: Span) -> None:
        """For ``Recorder.on_end``: queue a span that ended."""
        if len(self._queue) >= self._config.queue:
            self._queue.popleft()
            metrics.otlp_spans_dropped.inc()
        self._queue.append(span)

    async def run(self) -> None:
        async with httpcore.AsyncConnectionPool(self._tls, max_connections=2) as pool, trio.open_nursery() as nursery:
            if self._config.metrics:
                nursery.start_soon(self._send_metrics, pool)
            if self._config.traces:
                RECORDER.on_end = self.offer
                try:
                    await self._send_spans(pool)
                finally:
                    RECORDER.on_end = None
                    with trio.move_on_after(LAST_SECONDS, shield=True):
                        await self._send_batch(pool, once=True)

    async def _send_spans(self, pool: httpcore.AsyncConnectionPool) -> None:
        while True:
            await trio.sleep(FLUSH_SECONDS)
            while self._queue:
                await self._send_batch(pool)

    async def _send_batch(self, pool: httpcore.AsyncConnectionPool, *, once: bool = False) -> None:
        batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
        if batch:
            await self._send(pool, "traces", partial(otlp.render_spans, self._resource, batch), once=once)

    async def _send_metrics(self, pool: httpcore.AsyncConnectionPool) -> None:
        while True:
            await trio.sleep(self._config.metrics_interval)
            try:
                await metrics.refresh()
                families = list(metrics.REGISTRY.collect())
            except Exception:  # a bug in what is measured must not end the server
                _log.exception("metrics could not be collected")
                continue
            render = partial(otlp.render_metrics, self._resource, families, started=self._started, now=time.time_ns())
            await self._send(pool, "metrics", render)

    async def _send(
        self, pool: httpcore.AsyncConnectionPool, signal: str, render: Callable[[], bytes], *, once: bool = False
    ) -> None:
        """Send what ``render`` makes, or drop it; does not raise but for cancellation."""
        outcome = "error"
        try:
            body = await trio.to_thread.run_sync(lambda: gzip.compress(render(), 1))
            outcome = await self._repeat(pool, signal, body, 0.0 if once else GIVE_UP_SECONDS)
        except Exception:  # a bug here must not end the server
            _log.exception("%s could not be exported", signal)
        finally:
            metrics.otlp_exports.labels(signal, outcome).inc()

    async def _repeat(self, pool: httpcore.AsyncConnectionPool, signal: str, body: bytes, patience: float) -> str:
        """``success``, ``rejected`` or ``error``."""
        give_up, pause = trio.current_time() + patience, FIRST_PAUSE
        while True:
            try:
                return await self._post(pool, signal, body)
            except _Later as later:
                wait = max(later.pause, pause * random.uniform(0.8, 1.2))  # noqa: S311 - only spreads load
                self._report(f"the OpenTelemetry collector does not take {signal}: {later}")
                if trio.current_time() + wait > give_up:
                    return "error"
            await trio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _post(self, pool: httpcore.AsyncConnectionPool, signal: str, body: bytes) -> str:
        """One attempt. Raises _Later."""
        url = f"{self._base}/v1/{signal}"
        try:
            with trio.fail_after(self._config.timeout):
                async with pool.stream("POST", url, headers=self._headers, content=body) as response:
                    status, headers, answer = response.status, dict(response.headers), b""
                    async for piece in response.aiter_stream():
                        answer += piece
                        if len(answer) > _MAX_ANSWER:
                            break
        except httpcore.LocalProtocolError:  # its text has the header's value
            raise _Later("the request is not valid HTTP; check the headers in the configuration") from None
        except trio.TooSlowError:
            raise _Later(f"no answer within {self._config.timeout:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise _Later(cause_of(error)) from None
        if status in _LATER:
            after = headers.get(b"retry-after", b"")
            raise _Later(f"status {status}", min(float(after), LONGEST_PAUSE) if after.isdigit() else 0.0)
        rejected, why = otlp.parse_rejected(answer) if status == 200 else (0, "")
        if status != 200 or rejected:
            self._report(f"the OpenTelemetry collector refuses {signal}: {why or f'status {status}'}")
            return "rejected"
        if self._failing:
            self._failing = False
            _log.info("the OpenTelemetry collector accepts data again")
        return "success"

    def _report(self, text: str) -> None:
        """Once for each series of failures."""
        if not self._failing:
            self._failing = True
            _log.warning("%s", one_line(text)[:500])
