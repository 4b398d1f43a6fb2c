"""The engine process: the data plane (``ext/egress``) behind a control connection to the server.

It decides nothing. The server passes it listening sockets, keys and policies over the protocol of ``protocol.py``;
the native loops carry the traffic in threads of their own, and this thread only passes messages. Once it has what
``Start`` brings, it confines itself permanently (``ext/egress/confine.c``): it opens no files, runs no programs, and
cannot be dumped.

- It ends when it was asked to drain and the last connection has ended, or, unless it is ``adoptable``, with its server.
- An adoptable one that has policies keeps running without a server and waits for the next one to connect. Questions are
  kept and asked again, audit records stay in their ring until it is full. The newest connection counts.
- A message that does not follow the protocol ends the connection, not the traffic.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from hypeman._native.egress import REASONS, Engine, confine
from hypeman.egress import protocol, wire
from hypeman.egress.protocol import ProtocolError
from hypeman.host.descriptors import passing

_MAX_QUEUED = 1 << 20
"""Bytes waiting to be read by the server above which no audit records are sent: they wait in their ring."""
_QUESTION_LIFE = 60.0
"""Seconds after which an unanswered question is not asked again; the data plane gives up sooner."""
_APPROVAL_LIFE = 660.0
"""The same for requests that are held for an approval."""
_MAX_SETTINGS_AGE = 60.0
"""Seconds that the first message may take."""
_LAST_WORDS = 5.0
"""Seconds for the server to take what an ending engine still has to say."""


class Link:
    """A control connection. Non-blocking; raises ProtocolError and OSError once it is of no more use."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._receiver = wire.Receiver()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self.queued = 0
        """Bytes not yet taken by the peer."""

    def send(self, message: protocol.Report, payload: bytes = b"", descriptors: list[int] | None = None) -> None:
        """Queue a message; ``flush`` sends it."""
        head = protocol.encode(message, payload=len(payload), descriptors=len(descriptors or []))
        copies = [os.dup(descriptor) for descriptor in descriptors or []]  # they may be closed before they are sent
        for data, passed in ((head, copies), (payload, [])):
            if data:
                self._out.append((memoryview(data), passed))
                self.queued += len(data)

    def flush(self) -> None:
        while self._out:
            data, descriptors = self._out[0]
            try:
                sent = self.sock.sendmsg([data], passing(descriptors), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            self.queued -= sent
            _close(descriptors)
            if sent < len(data):
                self._out[0] = (data[sent:], [])
            else:
                self._out.popleft()

    def receive(self) -> tuple[protocol.Request, bytearray, list[int]] | None:
        """The next message, its payload (to be wiped) and descriptors (to be closed); None if it is not here yet."""
        while not self._receiver.complete:
            try:
                got, ancillary, flags, _ = self.sock.recvmsg_into([self._receiver.room()], wire.ANCILLARY, wire.FLAGS)
            except BlockingIOError:
                return None
            self._receiver.take(got, ancillary, flags)
        frame, descriptors = self._receiver.finish()
        assert frame.header is not None
        try:
            if frame.header.version != protocol.VERSION:
                raise ProtocolError(f"version {frame.header.version}, not {protocol.VERSION}")
            wire.check_descriptors(frame, descriptors)
            return protocol.decode_request(frame.message), frame.payload, descriptors
        except ProtocolError:
            frame.wipe()
            _close(descriptors)
            raise

    def close(self) -> None:
        for _, descriptors in self._out:
            _close(descriptors)
        self._out.clear()
        self._receiver.close()
        self.sock.close()


class Worker:
    """One engine and its server, if there is one."""

    def __init__(
        self, engine: Engine, start: protocol.Start, finder: socket.socket | None, listeners: list[int]
    ) -> None:
        self._engine = engine
        self._start = start
        self._finder = finder
        self._listeners = listeners
        self._draining = False
        self._locked = False
        self._link: Link | None = None
        self._sources: set[str] = set()
        """Addresses that have a policy."""
        self._set: set[str] = set()
        """Those set on this connection."""
        self._sites: set[str] = set()
        """Ingresses that have routes."""
        self._set_sites: set[str] = set()
        self._names: set[str] = set()
        """Host names that have certificates."""
        self._set_names: set[str] = set()
        self._ports: dict[int, list[int]] = {}
        """Sockets of ingresses by port, to be passed on."""
        self._set_ports: set[int] = set()
        self._open: dict[int, tuple[float, protocol.Question | protocol.Locate]] = {}
        """Questions without an answer, by token."""
        self._held: dict[int, tuple[float, protocol.ApprovalNeeded]] = {}
        """Requests without a verdict, by token."""

    def run(self, link: Link, *, locked: bool) -> None:
        """Serve until drained, or until the only server is gone."""
        self._locked = locked
        poller = select.poll()
        question_fd, audit_fd = self._engine.question_fd(), self._engine.audit_fd()
        poller.register(question_fd, select.POLLIN)
        poller.register(audit_fd, select.POLLIN)
        if self._finder is not None:
            poller.register(self._finder, select.POLLIN)
        self._take(poller, link)
        while self._engine.running():
            for fd, _ in poller.poll():
                if fd == question_fd:
                    os.read(fd, 8)
                    self._ask()
                elif fd == audit_fd:
                    os.read(fd, 8)
                    self._with_link(poller, self._send_records)
                elif self._finder is not None and fd == self._finder.fileno():
                    self._meet(poller)
                elif self._link is not None and fd == self._link.sock.fileno():
                    self._with_link(poller, self._serve)
            self._with_link(poller, Link.flush)
            if self._link is None and (self._finder is None or not (self._sources or self._sites)):
                return
            if self._link is not None:
                waiting = select.POLLOUT if self._link.queued else 0
                poller.modify(self._link.sock, select.POLLIN | waiting)
        self._with_link(poller, self._send_last)

    def _with_link(self, poller: select.poll, act: Callable[[Link], None]) -> None:
        """Do something with the connection; if it fails, do without it."""
        link = self._link
        if link is None:
            return
        try:
            act(link)
        except (EOFError, OSError, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                print(f"the control connection is closed: {error}", file=sys.stderr, flush=True)
            poller.unregister(link.sock)
            link.close()
            self._link = None

    def _meet(self, poller: select.poll) -> None:
        """Another server has connected."""
        assert self._finder is not None
        try:
            sock, _ = self._finder.accept()
        except OSError:
            return
        uid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid != self._owner:
            sock.close()
            return
        if self._link is not None:
            poller.unregister(self._link.sock)
            self._link.close()
        self._take(poller, Link(sock))

    _owner = os.geteuid()
    """The server's user: the one that started this process."""

    def _take(self, poller: select.poll, link: Link) -> None:
        self._link = link
        self._set.clear()
        self._set_sites.clear()
        self._set_names.clear()
        self._set_ports.clear()
        self._engine.forget(None)  # changes in between are unknown
        poller.register(link.sock, select.POLLIN)
        hello = protocol.Hello(
            version=protocol.VERSION,
            identity=self._start.identity,
            pid=os.getpid(),
            draining=self._draining,
            locked=self._locked,
            reasons=REASONS,
        )
        link.send(hello, descriptors=[] if self._draining else self._listeners)
        self._forget_questions()
        for _, question in self._open.values():
            link.send(question)
        for _, held in self._held.values():
            link.send(held)
        self._with_link(poller, self._send_records)
        self._with_link(poller, Link.flush)

    def _serve(self, link: Link) -> None:
        while (got := link.receive()) is not None:
            request, payload, descriptors = got
            try:
                self._do(link, request, payload, descriptors)
            finally:
                payload[:] = bytes(len(payload))
                _close(descriptors)
        self._send_records(link)

    def _do(self, link: Link, request: protocol.Request, payload: bytearray, descriptors: list[int]) -> None:
        engine = self._engine
        match request:
            case protocol.SetPolicy() | protocol.PutSite() | protocol.Certify() | protocol.Challenge():
                try:
                    self._put(request, payload)
                except (ValueError, MemoryError) as error:
                    link.send(protocol.Refused(id=request.id, message=str(error)))
                    return
            case protocol.RemovePolicy():
                self._remove(request.source)
            case protocol.Accept():
                for source in self._sources - self._set:
                    self._remove(source)
                for ingress in self._sites - self._set_sites:
                    self._drop(ingress)
                for name in self._names - self._set_names:
                    self._uncertify(name)
                for port in self._ports.keys() - self._set_ports:
                    self._unlisten(port)
                if not self._draining:
                    engine.accept()
            case protocol.Drain():
                self._draining = True
                engine.drain(request.grace_ms)
                _close(self._listeners)
                self._listeners = []
                for port in list(self._ports):
                    self._unlisten(port)
            case protocol.DropSite():
                self._drop(request.ingress)
            case protocol.Listen():
                self._listen(request.port, descriptors)
            case protocol.Unlisten():
                self._unlisten(request.port)
            case protocol.Sockets():
                link.send(protocol.Held(id=request.id), descriptors=self._ports.get(request.port))
                return
            case protocol.Forget():
                for instance in (None,) if request.instances is None else request.instances:
                    engine.forget(instance.encode() if instance is not None else None)
                for instance in request.ended:
                    engine.part(instance.encode())
                return
            case protocol.Count():
                self._send_counters(link, request.id)
                return
            case protocol.Answer():
                if self._open.pop(request.token, None) is not None:
                    addresses = [address.encode() for address in request.addresses]
                    engine.answer(request.loop, request.token, addresses)
                return
            case protocol.Verdict():
                if self._held.pop(request.token, None) is not None:
                    engine.decide(request.loop, request.token, request.allow)
                return
            case protocol.Place():
                if self._open.pop(request.token, None) is not None:
                    engine.place(request.loop, request.token, request.address.encode(), request.exists)
                return
            case protocol.Start():
                raise ProtocolError("started twice")
        link.send(protocol.Done(id=request.id))

    def _put(
        self,
        request: protocol.SetPolicy | protocol.PutSite | protocol.Certify | protocol.Challenge,
        payload: bytearray,
    ) -> None:
        """Raises ValueError, MemoryError if it is refused; ProtocolError."""
        engine = self._engine
        match request:
            case protocol.SetPolicy(source=source):
                engine.set_policy(source.encode(), request.instance.encode(), payload)
                self._sources.add(source)
                self._set.add(source)
            case protocol.PutSite(ingress=ingress):
                engine.put_site(ingress.encode(), payload)
                self._sites.add(ingress)
                self._set_sites.add(ingress)
            case protocol.Certify(name=name):
                engine.certify(name.encode(), *_parts(payload, request.sizes))
                self._names.add(name)
                self._set_names.add(name)
            case protocol.Challenge(name=name, token=token, proof=proof):
                parts = _parts(payload, request.sizes)
                engine.challenge(name.encode(), token.encode(), proof.encode(), *parts)
                self._names.add(name)
                self._set_names.add(name)

    def _drop(self, ingress: str) -> None:
        self._engine.drop_site(ingress.encode())
        self._sites.discard(ingress)
        self._set_sites.discard(ingress)

    def _uncertify(self, name: str) -> None:
        nothing = memoryview(b"\0")
        self._engine.certify(name.encode(), nothing, nothing)
        self._engine.challenge(name.encode(), b"", b"", nothing, nothing)
        self._names.discard(name)

    def _listen(self, port: int, descriptors: list[int]) -> None:
        """Keeps the descriptors if it has none for the port."""
        self._set_ports.add(port)
        if port not in self._ports and descriptors and not self._draining:
            self._ports[port] = [*descriptors]
            for descriptor in descriptors:
                self._engine.listen(os.dup(descriptor), port)
            descriptors.clear()

    def _unlisten(self, port: int) -> None:
        self._engine.unlisten(port)
        self._set_ports.discard(port)
        _close(self._ports.pop(port, []))

    def _remove(self, source: str) -> None:
        self._engine.remove(source.encode())
        self._sources.discard(source)
        self._set.discard(source)

    def _ask(self) -> None:
        self._forget_questions()
        for loop, token, instance, name in self._engine.questions():
            question: protocol.Question | protocol.Locate
            if name:
                question = protocol.Question(token=token, loop=loop, instance=instance, name=name)
            else:
                question = protocol.Locate(token=token, loop=loop, instance=instance)
            self._open[token] = (time.monotonic() + _QUESTION_LIFE, question)
            if self._link is not None:
                self._link.send(question)
        for loop, token, instance, tls, host, port, method, path, rule in self._engine.approvals():
            held = protocol.ApprovalNeeded(
                token=token, loop=loop, instance=instance, tls=tls, host=host, port=port, method=method, path=path,
                rule=rule,
            )  # fmt: skip
            self._held[token] = (time.monotonic() + _APPROVAL_LIFE, held)
            if self._link is not None:
                self._link.send(held)

    def _forget_questions(self) -> None:
        now = time.monotonic()
        while self._open and next(iter(self._open.values()))[0] < now:
            del self._open[next(iter(self._open))]
        while self._held and next(iter(self._held.values()))[0] < now:
            del self._held[next(iter(self._held))]

    def _send_last(self, link: Link) -> None:
        self._send_records(link)
        self._send_counters(link, 0)
        link.sock.settimeout(_LAST_WORDS)
        link.flush()

    def _send_counters(self, link: Link, number: int) -> None:
        engine = self._engine
        counted = protocol.Counters(
            id=number,
            counters=engine.metrics(),
            denied=engine.denied(),
            latency=tuple(engine.latency()),
            in_use={name: max(0, count) for name, count in engine.in_use().items()},
            largest=engine.largest(),
            limited=engine.limited(),
        )
        link.send(counted)

    def _send_records(self, link: Link) -> None:
        while link.queued < _MAX_QUEUED and (records := self._engine.audit()):
            link.send(protocol.Audit(), records)


def main(fd: int, confine: Callable[[int], bool] = confine) -> int:
    """Serve on the control connection ``fd``; returns the exit code."""
    link = Link(socket.socket(fileno=fd))
    try:
        start, payload, descriptors = _first(link)
        try:
            engine, finder, listeners = _make(start, payload, descriptors)
        finally:
            payload[:] = bytes(len(payload))
        locked = confine(start.settings.uid)
        engine.start()
    except (EOFError, ProtocolError, ValueError, OSError) as error:
        try:
            link.send(protocol.Failed(message=str(error)[:1000]))
            link.flush()
        except OSError:
            pass
        return 1
    Worker(engine, start, finder, listeners).run(link, locked=locked)
    engine.drain(0)
    engine.join()
    return 0


def _first(link: Link) -> tuple[protocol.Start, bytearray, list[int]]:
    deadline = time.monotonic() + _MAX_SETTINGS_AGE
    while (got := link.receive()) is None:
        if not select.select([link.sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise ProtocolError("nothing came")
    request, payload, descriptors = got
    if not isinstance(request, protocol.Start):
        raise ProtocolError("not started yet")
    return request, payload, descriptors


def _make(
    start: protocol.Start, payload: bytearray, descriptors: list[int]
) -> tuple[Engine, socket.socket | None, list[int]]:
    """The engine, the socket where servers find it, and its listeners to pass on. Raises ValueError, OSError."""
    if len(descriptors) < 1 + start.adoptable:
        raise ProtocolError("what the first message announces did not come with it")
    certificate, key, trusted, extra = _parts(payload, start.sizes)
    finder = socket.socket(fileno=descriptors.pop(0)) if start.adoptable else None
    if finder is not None:
        finder.setblocking(False)
        finder.listen(8)  # here and not by the server, so that who connects sees this process's id
    settings = start.settings
    engine = Engine(
        [os.dup(descriptor) for descriptor in descriptors],
        certificate,
        key,
        trusted,
        extra,
        settings.leaf_cache,
        settings.each,
        settings.total,
        settings.clients_each,
        settings.clients_total,
        settings.requests_per_second,
        settings.mints_per_second,
        settings.listen_port,
        settings.assumed_tls_port,
        list(settings.timers_ms),
        [network.encode() for network in settings.allow],
        [network.encode() for network in settings.deny],
    )
    return engine, finder, descriptors


def _parts(payload: bytearray, sizes: Sequence[int]) -> list[memoryview]:
    """Raises ProtocolError."""
    if sum(sizes) != len(payload):
        raise ProtocolError("what the message announces did not come with it")
    view, at, parts = memoryview(payload), 0, []
    for size in sizes:
        parts.append(view[at : at + size])
        at += size
    return parts


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
