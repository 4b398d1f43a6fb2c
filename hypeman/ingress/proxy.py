"""Carries requests from clients to guests.

Each client's connection has a task; its connection to a guest is its own, is kept for its next request to the same
guest, and is never shared with other clients. Bodies pass through in pieces, both ways at once.

    no rule for the host         404      guest refuses the connection, or resets it     502
    wrong or no auth header      401      guest is silent                                504
    instance does not run        503      client leaves                                  (499 in the log)
    plain, but the rule has tls  308, or 403 without ``redirect_http``
    over TLS for another name    421

A connection whose first byte is that of a TLS handshake is TLS, on every port (``tls.py``).

A response that has begun and cannot be completed ends in a reset, so that nobody takes it for whole.
"""

from __future__ import annotations

import errno
import math
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import h11
import trio

from hypeman.ingress.heads import BadRequest, Head, is_authorized, read_head, request_headers, response_headers
from hypeman.ingress.hello import HANDSHAKE
from hypeman.ingress.pages import render_bare, render_page
from hypeman.ingress.protocol import Served
from hypeman.ingress.routing import Found, Route, RoutingTable
from hypeman.ingress.streams import Failed, Limits, Malformed, Side, Stream, TimedOut, tunnel
from hypeman.ingress.tls import ACME_TLS_1, Alert, Certificates, TlsStream, alert_record

_MAX_LOGGED = 200
CLIENT_LEFT = 499
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LATER = "The service behind this address is not running at the moment."
_UNKNOWN = "There is no site with this name here."
_ACME_PATH = b"/.well-known/acme-challenge/"
_FIRST = 1 << 14


class Place(NamedTuple):
    """Where an instance is."""

    address: str
    """Empty if it does not run."""
    exists: bool


AskPlace = Callable[[str], Awaitable[Place]]


class _Ours(BadRequest):
    """Not an error, but our own response all the same."""

    def __init__(self, status: int, message: str, *, location: str = "", is_bare: bool = False) -> None:
        super().__init__(status, message)
        self.location = location
        self.is_bare = is_bare
        """The message is the whole body."""


class NoAnswer(BadRequest):
    """The guest has no response; ``status`` is what the client gets."""


class ClientLeft(Exception):
    """Nobody waits for the response any more."""


@dataclass
class _Note:
    """What is logged about a request."""

    client: str
    ingress: str = ""
    host: str = ""
    method: str = ""
    path: str = ""
    instance: str = ""
    status: int = 0
    received: int = 0
    sent: int = 0
    goes_on: bool = False
    """The connection can take another request."""


class Proxy:
    """All listeners and routes. ``serve`` one listener after another in a nursery."""

    def __init__(self, ask: AskPlace, served: Callable[[Served], None], limits: Limits | None = None) -> None:
        self._ask = ask
        self._served = served
        self._limits = limits or Limits()
        self._table = RoutingTable()
        self.certificates = Certificates()
        self._routes: dict[str, tuple[Route, ...]] = {}
        self._open: dict[str, set[trio.CancelScope]] = {}
        """Exchanges by ingress."""
        self._clients: Counter[str] = Counter()
        self.connections = 0
        self.refused = 0

    def put(self, ingress: str, routes: tuple[Route, ...]) -> None:
        """Routes of an ingress, instead of those before."""
        for route in self._routes.get(ingress, ()):
            self._table.remove(route)
        self._routes[ingress] = routes
        for route in routes:
            self._table.add(route)

    def drop(self, ingress: str) -> None:
        """Remove the routes of an ingress and end its exchanges. Idempotent."""
        for route in self._routes.pop(ingress, ()):
            self._table.remove(route)
        for scope in self._open.pop(ingress, set()):
            scope.cancel()

    async def serve(self, listener: trio.socket.SocketType, port: int) -> None:
        """Accept connections, which are for ``port``, until cancelled. Closes the listener."""
        with listener:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        accepted, peer = await listener.accept()
                    except OSError as error:
                        if error.errno in (errno.EBADF, errno.EINVAL):
                            return
                        if error.errno in _FULL:
                            await trio.sleep(0.1)
                        continue
                    nursery.start_soon(self._meet, accepted, str(peer[0]).partition("%")[0], port)

    async def _meet(self, accepted: trio.socket.SocketType, client: str, port: int) -> None:
        share = client if ":" not in client else _network_of(client)
        if self.connections >= self._limits.connections or self._clients[share] >= self._limits.each:
            self.refused += 1
            accepted.close()
            return
        self.connections += 1
        self._clients[share] += 1
        try:
            await self._greet(trio.SocketStream(accepted), client, port)
        except Exception:  # a fault of ours must not end the connections of others
            traceback.print_exc(limit=8, file=sys.stderr)
        finally:
            accepted.close()
            self.connections -= 1
            self._clients[share] -= 1
            if not self._clients[share]:
                del self._clients[share]

    async def _greet(self, stream: trio.SocketStream, client: str, port: int) -> None:
        """Plain or TLS?"""
        try:
            with trio.fail_after(self._limits.head):
                first = bytes(await stream.receive_some(_FIRST))
            if first[:1] == bytes((HANDSHAKE,)):
                with trio.fail_after(self._limits.handshake):
                    found = await self._shake_hands(stream, first, port)
                if found is not None:
                    await _Client(self, found[1], client, port, name=found[0]).carry()
            elif first:
                await _Client(self, stream, client, port, first=first).carry()
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _shake_hands(self, stream: trio.SocketStream, first: bytes, port: int) -> tuple[str, TlsStream] | None:
        """The name and a stream for requests; None if there will be none."""

        def is_routed(name: str) -> bool:
            found = self._table.find(name, port)
            return found is not None and found.route.tls

        while (chosen := self.certificates.choose(first, is_routed)) is None:
            more = await stream.receive_some(_FIRST)
            if not more:
                return None
            first += more
        if isinstance(chosen, Alert):
            await stream.send_all(alert_record(chosen))
            await stream.send_eof()
            while await stream.receive_some(_FIRST):
                pass
            return None
        name, context = chosen
        tls = TlsStream(stream, context, first)
        await tls.handshake()
        if tls.protocol == ACME_TLS_1:
            await tls.send_close()
            return None
        return name, tls

    def find(self, host: str, port: int) -> Found | None:
        return self._table.find(host, port)

    @contextmanager
    def ended_with(self, ingress: str) -> Iterator[trio.CancelScope]:
        """Within the block the task is cancelled if the ingress is dropped."""
        scopes = self._open.setdefault(ingress, set())
        with trio.CancelScope() as scope:
            scopes.add(scope)
            try:
                yield scope
            finally:
                scopes.discard(scope)
                if not scopes and self._open.get(ingress) is scopes:
                    del self._open[ingress]

    async def place_of(self, found: Found) -> str:
        """The address. Raises NoAnswer."""
        try:
            with trio.fail_after(self._limits.lookup):
                place = await self._ask(found.instance)
        except trio.TooSlowError:
            raise NoAnswer(503, _LATER) from None
        if place.address:
            return place.address
        if not place.exists and "{" in found.route.instance:
            raise NoAnswer(404, _UNKNOWN)
        raise NoAnswer(503, _LATER)

    @property
    def limits(self) -> Limits:
        return self._limits

    def note(self, note: _Note, seconds: float) -> None:
        self._served(
            Served(
                ingress=note.ingress, host=note.host, client=note.client, method=note.method, path=note.path,
                instance=note.instance, status=note.status, received=note.received, sent=note.sent, seconds=seconds,
            )
        )  # fmt: skip


def _network_of(address: str) -> str:
    packed = socket.inet_pton(socket.AF_INET6, address)
    return socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))


class _Client:
    """One connection of a client, and its connection to a guest."""

    def __init__(
        self, proxy: Proxy, stream: Stream, address: str, port: int, *, first: bytes = b"", name: str = ""
    ) -> None:
        """``first``: what was received already; ``name``: of the certificate, empty without TLS."""
        self._proxy = proxy
        self._limits = proxy.limits
        self._side = Side(stream, h11.SERVER, proxy.limits)
        if first:
            self._side.http.receive_data(first)
        self._address = address
        self._port = port
        self._name = name
        self._guest: Side | None = None
        self._guest_at = ("", 0)
        self._version = b"1.1"

    async def carry(self) -> None:
        """All requests of the connection, one after another."""
        seconds = self._limits.head
        try:
            while True:
                try:
                    with trio.fail_after(seconds):
                        event = await self._side.next_event(seconds)
                except trio.TooSlowError:
                    return
                except Malformed as error:
                    await self._refuse_malformed(error)
                    return
                if not isinstance(event, h11.Request):
                    return
                if not await self._take(event):
                    return
                self._side.http.start_next_cycle()
                seconds = self._limits.idle
        except Failed:
            pass
        finally:
            await self._leave_guest()
            await self._side.close()

    async def _refuse_malformed(self, error: Malformed) -> None:
        status = error.status if error.status in (400, 431) else 400
        await self._answer(_Note(self._address), BadRequest(status, "The request is not understood."), html=False)
        await self._side.close_after_reading()

    async def _take(self, request: h11.Request) -> bool:
        """One request; whether the connection goes on."""
        note = _Note(self._address, method=request.method[:20].decode("ascii", "replace"))
        note.path = request.target.partition(b"?")[0][:_MAX_LOGGED].decode("ascii", "replace")
        self._version = request.http_version
        began = trio.current_time()
        try:
            html = any(name == b"accept" and b"text/html" in value for name, value in request.headers)
            try:
                head = read_head(request.method, request.target, request.http_version, request.headers)
                note.host = head.host
                found = self._find(head)
                route = found.route
                note.ingress = route.ingress
                self._check_scheme(head, route)
                if route.auth_header and not is_authorized(head.headers, route.auth_header, route.auth_value):
                    raise BadRequest(401, "This site wants a header that the request does not have.")
                note.instance = found.instance
                with self._proxy.ended_with(route.ingress) as scope:
                    await self._pass(head, found, note)
                if scope.cancelled_caught:
                    await self._side.reset()
                    return False
            except BadRequest as error:
                await self._answer(note, error, html=html)
            if not self._side.is_reusable():
                await self._side.close_after_reading()
                return False
            return True
        except ClientLeft:
            note.status = note.status or CLIENT_LEFT
            await self._side.reset()
            return False
        except Failed:
            await self._side.reset()
            return False
        finally:
            self._proxy.note(note, trio.current_time() - began)

    async def _answer(self, note: _Note, error: BadRequest, *, html: bool) -> None:
        """Our own response. Raises Failed."""
        note.status = error.status
        headers, body = render_page(error.status, error.message, html=html)
        if isinstance(error, _Ours) and error.is_bare:
            headers, body = render_bare(error.message)
        if isinstance(error, _Ours) and error.location:
            headers.append((b"location", error.location.encode()))
        side = self._side
        side.discard_received()
        if side.http.their_state is not h11.DONE:
            headers.append((b"connection", b"close"))
        seconds = self._limits.body
        await side.send(h11.Response(status_code=error.status, headers=headers), seconds)
        await side.send(h11.Data(data=body), seconds)
        await side.send(h11.EndOfMessage(), seconds)

    def _find(self, head: Head) -> Found:
        """The rule. Raises BadRequest, or _Ours for a public CA that wants to see an answer."""
        if self._name and head.host != self._name:
            raise BadRequest(421, "This connection is for another site.")
        if not self._name and head.target.startswith(_ACME_PATH):
            token = head.target[len(_ACME_PATH) :].decode("ascii", "replace")
            answer = self._proxy.certificates.answer(head.host, token)
            if answer is not None:
                raise _Ours(200, answer, is_bare=True)
        found = self._proxy.find(head.host, self._port)
        if found is None:
            raise BadRequest(404, _UNKNOWN)
        return found

    def _check_scheme(self, head: Head, route: Route) -> None:
        """Raises BadRequest."""
        if self._name:
            if not route.tls:  # it was another one when the connection began
                raise BadRequest(421, "This site has no TLS.")
        elif route.redirect:
            port = "" if route.redirect == 443 else f":{route.redirect}"
            target = head.target.decode("latin-1") if head.target != b"*" else "/"
            raise _Ours(308, "This site is at another address.", location=f"https://{head.host}{port}{target}")
        elif route.tls:
            raise BadRequest(403, "This site wants HTTPS.")

    # ── To the guest and back ────────────────────────────────────────────────────────────────────

    async def _pass(self, head: Head, found: Found, note: _Note) -> None:
        """Raises NoAnswer before the response has begun, Failed afterwards, or ClientLeft."""
        address = await self._proxy.place_of(found)
        at = (address, found.route.target_port)
        headers = request_headers(
            head, client=self._address, scheme="https" if self._name else "http", secret=found.route.auth_header
        )
        request = h11.Request(method=head.method, target=head.target, headers=headers)
        if self._guest is not None and (self._guest_at != at or not self._guest.is_quiet()):
            await self._leave_guest()
        was_used = self._guest is not None
        guest = self._guest or await self._connect(at)
        try:
            await self._exchange(guest, request, head, note)
        except NoAnswer:
            # The guest may have closed a connection that was kept just when the request was sent.
            again = was_used and not guest.has_begun and not head.has_body and head.method in (b"GET", b"HEAD")
            await self._leave_guest()
            if not again:
                raise
            await self._exchange(await self._connect(at), request, head, note)
        finally:
            if self._guest is not None:
                if self._guest.is_reusable():
                    self._guest.http.start_next_cycle()
                    self._guest.has_begun = False
                else:
                    await self._leave_guest()

    async def _connect(self, at: tuple[str, int]) -> Side:
        opened = trio.socket.socket(socket.AF_INET6 if ":" in at[0] else socket.AF_INET, socket.SOCK_STREAM)
        try:
            with trio.fail_after(self._limits.connect):
                await opened.connect(at)
        except trio.TooSlowError:
            opened.close()
            raise NoAnswer(504, "The service behind this address does not answer.") from None
        except OSError as error:
            opened.close()
            status = 504 if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH) else 502
            raise NoAnswer(status, "The service behind this address does not accept connections.") from None
        except BaseException:
            opened.close()
            raise
        self._guest = Side(trio.SocketStream(opened), h11.CLIENT, self._limits)
        self._guest_at = at
        return self._guest

    async def _leave_guest(self) -> None:
        guest, self._guest = self._guest, None
        if guest is not None:
            await guest.close()

    async def _exchange(self, guest: Side, request: h11.Request, head: Head, note: _Note) -> None:
        problem: Exception | None = None
        is_switched = False
        try:
            await guest.send(request, self._limits.body)
        except Failed:
            raise NoAnswer(502, "The service behind this address does not accept requests.") from None
        upload = _Upload(self._side, guest, note, self._limits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.run, nursery.cancel_scope)
            try:
                is_switched = await self._download(guest, head, note)
            except (NoAnswer, Failed, ClientLeft) as error:
                problem = error
            nursery.cancel_scope.cancel()
        if upload.left:
            raise ClientLeft
        if upload.is_stuck and not note.status:
            raise NoAnswer(504, "The service behind this address does not read the request.")
        if problem is not None:
            raise problem
        if upload.is_stuck:
            raise Failed("stuck")
        if is_switched:
            note.received, note.sent = await tunnel(self._side, guest, self._limits.quiet)

    async def _download(self, guest: Side, head: Head, note: _Note) -> bool:
        """The response; True if the connection is no longer HTTP."""
        while True:
            seconds = self._limits.quiet if note.status else self._limits.answer
            try:
                event = await guest.next_event(seconds)
            except TimedOut:
                if note.status:
                    raise
                raise NoAnswer(504, "The service behind this address does not answer.") from None
            except Failed:
                if note.status:
                    raise
                raise NoAnswer(502, "The service behind this address sent no valid response.") from None
            match event:
                case h11.InformationalResponse(status_code=101):
                    note.status = 101
                    headers = response_headers(list(event.headers), switching=True)
                    await self._to_client(h11.InformationalResponse(status_code=101, headers=headers))
                    return True
                case h11.InformationalResponse():
                    if self._version == b"1.1":
                        headers = response_headers(list(event.headers))
                        await self._to_client(h11.InformationalResponse(status_code=event.status_code, headers=headers))
                case h11.Response():
                    note.status = event.status_code
                    headers = response_headers(list(event.headers))
                    await self._to_client(
                        h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
                    )
                case h11.Data():
                    note.sent += len(event.data)
                    await self._to_client(h11.Data(data=event.data))
                case h11.EndOfMessage():
                    await self._to_client(h11.EndOfMessage())
                    return False
                case _:
                    if note.status:
                        raise Failed("the response has no end")
                    raise NoAnswer(502, "The service behind this address closed the connection.")

    async def _to_client(self, event: h11.Event) -> None:
        try:
            await self._side.send(event, self._limits.body)
        except Failed:
            raise ClientLeft from None


class _Upload:
    """Passes the request's body on; then watches whether the client stays."""

    def __init__(self, client: Side, guest: Side, note: _Note, limits: Limits) -> None:
        self._client = client
        self._guest = guest
        self._note = note
        self._limits = limits
        self.left = False
        """The client has closed the connection or does not send what it announced."""
        self.is_stuck = False
        """The guest does not read."""

    async def run(self, exchange: trio.CancelScope) -> None:
        try:
            if await self._pass_body():
                data = await self._client.receive_raw(math.inf)  # it ends with the exchange
                self._client.http.receive_data(data)
                self.left = not data
        except Failed:
            self.left = True
        if self.left or self.is_stuck:
            exchange.cancel()

    async def _pass_body(self) -> bool:
        """False if the guest does not take it. A response may still come, as in a refusal of large uploads."""
        while True:
            if self._client.http.their_state is h11.SEND_BODY:
                event = await self._client.next_event(self._limits.body)
            else:
                event = h11.EndOfMessage()  # it came before: this is the second attempt
            match event:
                case h11.Data():
                    self._note.received += len(event.data)
                    passed: h11.Event = h11.Data(data=event.data)
                case h11.EndOfMessage():
                    passed = h11.EndOfMessage()
                case _:
                    raise Failed("the request has no end")
            try:
                await self._guest.send(passed, self._limits.answer)
            except TimedOut:
                self.is_stuck = True
                return False
            except Failed:
                return False
            if isinstance(passed, h11.EndOfMessage):
                return True
