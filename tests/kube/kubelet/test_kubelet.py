"""The kubelet's API as the cluster calls it: TLS, WebSockets and the project's server with fakes behind it."""

from __future__ import annotations

import json
import os
import re
import ssl
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.testing
import trustme
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    RejectConnection,
    RejectData,
    Request,
)

from hypeman.errors import Unauthorized
from hypeman.host.log_times import begin_run
from hypeman.instances.model.types import Instance, InstanceNetwork, InstanceState
from hypeman.kube.api import Unreachable
from hypeman.kube.kubelet import portforward, spdy
from hypeman.kube.kubelet.app import Kubelet
from hypeman.kube.kubelet.auth import MAX_REVIEWS, Gate
from hypeman.kube.kubelet.routes import permission_for
from hypeman.kube.kubelet.service import server_context
from hypeman.kube.local import LocalServer
from hypeman.kube.site import Served
from hypeman.kube.types import ContainerState, ContainerStatus, ObjectMeta, Pod, PodStatus
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_tcp, bind_unix
from tests.fakes.services import FakeWorld

TOKENS = {"good": "system:serviceaccount:monitoring:scraper", "other": "nobody"}
MAY = {
    ("admin", "get", "proxy"),
    ("admin", "create", "proxy"),
    ("system:serviceaccount:monitoring:scraper", "get", "metrics"),
}


class FakeApi:
    """Answers the two reviews."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.fails = False

    async def create(self, path: str, body: Any, kind: type[Any]) -> Any:
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise Unreachable("no answer")
        spec = body["spec"]
        self.asked.append((body["kind"], spec))
        if body["kind"] == "TokenReview":
            name = TOKENS.get(spec["token"])
            status: Any = {"authenticated": name is not None, "user": {"username": name or "", "groups": ["g"]}}
        else:
            wanted = spec["resourceAttributes"]
            assert (wanted["resource"], wanted["name"]) == ("nodes", "node1")
            status = {"allowed": (spec["user"], wanted["verb"], wanted["subresource"]) in MAY}
        return msgspec.convert({"status": status}, kind)


class SlowApi(FakeApi):
    """Takes a second, and counts how many requests wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.open = self.most = 0

    async def create(self, path: str, body: Any, kind: type[Any]) -> Any:
        self.open += 1
        self.most = max(self.most, self.open)
        await trio.sleep(1)
        self.open -= 1
        return await super().create(path, body, kind)


class Pods:
    def __init__(self) -> None:
        self.served: dict[str, Served] = {}

    def find(self, namespace: str, name: str) -> Served | None:
        return self.served.get(f"{namespace}/{name}")

    def all(self) -> tuple[Served, ...]:
        return tuple(self.served.values())


class Site:
    """A kubelet's API on a port, and who may call it."""

    def __init__(self, tmp_path: Path) -> None:
        logs = tmp_path / "logs"
        logs.mkdir()
        self.world = FakeWorld(logs)
        self.api = FakeApi()
        self.pods = Pods()
        self.authority = trustme.CA()
        self.port = 0

    def add(self, name: str = "web", *, restarts: int = 0, **changes: Any) -> Instance:
        """A pod with a running instance."""
        instance = self.world.instances.add(f"{name}-1", **changes)
        network = InstanceNetwork(enabled=True, name="default", ip="127.0.0.1", mac="02:00:00:00:00:02")
        instance = msgspec.structs.replace(instance, network=network)
        about = ObjectMeta(name=name, namespace="default", uid=f"uid-{name}")
        status = ContainerStatus(
            name="main", state=ContainerState(), ready=True, restart_count=restarts, image="", image_id=""
        )
        pod = Pod(
            metadata=about, spec={"containers": [{"name": "main"}]}, status=PodStatus(container_statuses=(status,))
        )
        self.pods.served[f"default/{name}"] = Served(pod, instance)
        return instance

    def end(self, instance: Instance) -> None:
        """Its program ends."""
        ended = msgspec.structs.replace(instance, state=InstanceState.STOPPED)
        self.world.instances.instances[instance.id] = ended

    def context(self, certificate: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if certificate:
            self.authority.issue_cert("x", common_name="admin", organization_name="masters").configure_cert(context)
        return context

    async def get(self, path: str, *, token: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with httpx.AsyncClient(verify=self.context(certificate=not token), timeout=30) as client:
            return await client.get(f"https://127.0.0.1:{self.port}{path}", headers=headers)

    @asynccontextmanager
    async def socket(self, path: str, *protocols: str) -> AsyncIterator[WebSocket]:
        transport = await trio.open_tcp_stream("127.0.0.1", self.port)
        stream = trio.SSLStream(transport, self.context(), server_hostname="127.0.0.1", https_compatible=True)
        try:
            with trio.fail_after(30):
                socket = WebSocket(stream)
                await socket.open(path, protocols)
                yield socket
        finally:
            await trio.aclose_forcefully(stream)


class WebSocket:
    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._connection = WSConnection(ConnectionType.CLIENT)
        self._events: list[Any] = []
        self.protocol: str | None = None
        self.rejected: tuple[int, str] | None = None

    async def open(self, path: str, protocols: tuple[str, ...]) -> None:
        request = Request(host="x", target=path, subprotocols=list(protocols))
        await self._stream.send_all(self._connection.send(request))
        event = await self._event()
        if isinstance(event, RejectConnection):
            data = await self._event()
            assert isinstance(data, RejectData)
            self.rejected = event.status_code, bytes(data.data).decode()
        else:
            assert isinstance(event, AcceptConnection)
            self.protocol = event.subprotocol

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(self._connection.send(BytesMessage(data=data)))

    async def receive(self) -> bytes | None:
        whole = b""
        while True:
            event = await self._event()
            if isinstance(event, CloseConnection):
                return None
            assert isinstance(event, Message)
            whole += bytes(event.data)
            if event.message_finished:
                return whole

    async def receive_all(self) -> list[bytes]:
        found = []
        while (data := await self.receive()) is not None:
            found.append(data)
        return found

    async def _event(self) -> Any:
        while not self._events:
            data = await self._stream.receive_some()
            self._connection.receive_data(bytes(data) or None)
            self._events += self._connection.events()
        return self._events.pop(0)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    path = str(tmp_path / "hypeman.sock")
    app = build_app(site.world.services, ServerSettings(jwt_secret="not used, but long enough"))
    local = LocalServer(f"unix://{path}")
    kubelet = Kubelet("node1", Gate(site.api, "node1"), site.pods, local, tmp_path)  # type: ignore[arg-type]
    context = server_context(site.authority.cert_pem.bytes().decode())
    site.authority.issue_cert("127.0.0.1").configure_cert(context)
    sockets = bind_tcp("127.0.0.1", 0)
    site.port = sockets[0].getsockname()[1]
    async with trio.open_nursery() as nursery:
        end = trio.Event()
        trusted = [bind_unix(path, mode=0o600)]
        await nursery.start(partial(Server(app, plain=app.plain, grace=1.0).run, [], end, trusted=trusted))
        await nursery.start(Server(kubelet, tls=context, grace=1.0).run, sockets, end)
        yield site
        nursery.cancel_scope.cancel()
    await local.aclose()


def status(message: bytes) -> Any:
    assert message[0] == 3
    return json.loads(message[1:])


async def test_who_may_call(site: Site) -> None:
    """A certificate of the cluster's CA or a token that the cluster knows, and what the cluster permits."""
    assert (await site.get("/healthz")).text == "ok"
    assert (await site.get("/metrics/resource", token="good")).status_code == 200
    refused = await site.get("/healthz", token="good")
    assert (refused.status_code, refused.text) == (
        403, "system:serviceaccount:monitoring:scraper may not get nodes/healthz or nodes/proxy of node1\n",
    )  # fmt: skip
    assert (await site.get("/healthz", token="bad")).status_code == 401
    async with httpx.AsyncClient(verify=site.context(certificate=False)) as client:
        assert (await client.get(f"https://127.0.0.1:{site.port}/healthz")).status_code == 401
    reviews = [spec for _, spec in site.api.asked if spec.get("user") == "admin"]
    assert [list(spec["groups"]) for spec in reviews] == [["masters", "system:authenticated"]] * 2


async def test_decisions_are_kept_and_nothing_else_is_permitted(site: Site) -> None:
    """While the API server does not answer, what it has permitted lately is permitted, and nothing more."""
    assert (await site.get("/metrics/resource", token="good")).status_code == 200
    asked = len(site.api.asked)
    site.api.fails = True
    assert (await site.get("/metrics/resource", token="good")).status_code == 200
    assert (await site.get("/metrics/resource", token="other")).status_code == 503
    assert (await site.get("/healthz")).status_code == 503
    assert len(site.api.asked) == asked


async def test_another_ca_is_refused(site: Site) -> None:
    context = ssl.create_default_context()
    site.authority.configure_trust(context)
    trustme.CA().issue_cert("x", common_name="admin").configure_cert(context)
    async with httpx.AsyncClient(verify=context) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"https://127.0.0.1:{site.port}/healthz")
    assert site.api.asked == []


async def test_invented_tokens_leave_the_api_server_to_others(autojump_clock: trio.testing.MockClock) -> None:
    """Each of them is reviewed, but only a few at a time."""
    api = SlowApi()
    gate = Gate(api, "node1")  # type: ignore[arg-type]
    refused = 0

    async def call(number: int) -> None:
        nonlocal refused
        with pytest.raises(Unauthorized):
            await gate.check(None, f"Bearer token-{number}", permission_for("GET", "/pods"))
        refused += 1

    async with trio.open_nursery() as nursery:
        for number in range(5 * MAX_REVIEWS):
            nursery.start_soon(call, number)
    assert (api.most, refused) == (MAX_REVIEWS, 5 * MAX_REVIEWS)


async def test_exec(site: Site) -> None:
    site.add()
    async with site.socket(
        "/exec/default/web/main?command=both&command=out&command=err&output=1&error=1",
        "v5.channel.k8s.io",
        "v4.channel.k8s.io",
    ) as socket:
        assert socket.protocol == "v5.channel.k8s.io"
        out, err, last = await socket.receive_all()
        assert (out, err) == (b"\x01out", b"\x02err")
        assert status(last)["status"] == "Success"
    async with site.socket("/exec/default/web/main?command=cat&input=1&output=1", "v4.channel.k8s.io") as socket:
        assert socket.protocol == "v4.channel.k8s.io"
        await socket.send(b"\0exit 3")
        data, last = await socket.receive_all()
        assert data == b"\x01EXIT 3"
        assert status(last)["reason"] == "NonZeroExitCode"
        assert status(last)["details"]["causes"] == [{"reason": "ExitCode", "message": "3"}]


async def test_an_ephemeral_container_is_refused_in_words_that_reach_the_user(site: Site) -> None:
    """The API server shows the text of a 400, but not of a 404."""
    site.add()
    served = site.pods.served["default/web"]
    spec = {**served.pod.spec, "ephemeralContainers": [{"name": "debugger", "image": "x"}]}
    site.pods.served["default/web"] = Served(msgspec.structs.replace(served.pod, spec=spec), served.instance)
    refused = await site.get("/containerLogs/default/web/debugger")
    assert (refused.status_code, "kubectl exec" in refused.text) == (400, True)
    async with site.socket("/attach/default/web/debugger", "v5.channel.k8s.io") as socket:
        assert socket.rejected is not None and socket.rejected[0] == 400


async def test_exec_with_a_terminal_and_the_end_of_input(site: Site) -> None:
    site.add()
    async with site.socket("/exec/default/web/main?command=sh&input=1&output=1&tty=1", "v5.channel.k8s.io") as socket:
        await socket.send(b'\x04{"Width":120,"Height":50}')
        assert await socket.receive() == b"\x0150x120\r\n"
        await socket.send(b"\xff\x00")
        assert status((await socket.receive_all())[-1])["status"] == "Success"


async def test_exec_that_cannot_be(site: Site) -> None:
    """A refusal comes before the upgrade, with the server's status and words."""
    site.add()
    site.add("asleep", state=InstanceState.STOPPED)
    for path, code, words in (
        ("/exec/default/no/main?command=ls", 404, 'pod "no" does not exist'),
        ("/exec/default/web/other?command=ls", 404, 'container "other" not found'),
        ("/exec/default/web/uid-old/main?command=ls", 404, 'pod "web" does not exist'),
        ("/exec/default/asleep/main?command=ls", 409, 'the VM of pod "asleep" is Stopped'),
        ("/attach/default/web/main?input=1", 501, "kubectl exec -it"),
    ):
        async with site.socket(path, "v5.channel.k8s.io") as socket:
            assert socket.rejected is not None, path
            assert socket.rejected[0] == code
            assert words in socket.rejected[1]
    async with site.socket("/exec/default/web/main?command=ls", "base64.channel.k8s.io") as socket:
        assert socket.rejected is not None and socket.rejected[0] == 400
    assert (await site.get("/exec/default/web/main?command=ls")).status_code == 400
    by_spdy = await site.get("/exec/default/asleep/main?command=ls")
    assert (by_spdy.status_code, by_spdy.text) == (409, 'the VM of pod "asleep" is Stopped\n')


async def test_logs(site: Site, tmp_path: Path) -> None:
    instance = site.add()
    log = tmp_path / "logs" / f"{instance.name}-app.log"
    log.write_bytes(b"one\ntwo \xff\nthree\n")
    path = "/containerLogs/default/web/main"
    log.unlink()
    assert (await site.get(path)).text == "", "it has printed nothing yet"
    log.write_bytes(b"one\ntwo \xff\nthree\n")
    assert (await site.get(path)).content == b"one\ntwo \xff\nthree\n"
    assert (await site.get(f"{path}?tailLines=1")).text == "three\n"
    assert (await site.get(f"{path}?tailLines=0")).text == ""
    assert (await site.get(f"{path}?limitBytes=6")).text == "one\ntw"
    previous = await site.get(f"{path}?previous=true")
    assert (previous.status_code, previous.text) == (
        400, 'previous terminated container "main" in pod "web" not found\n',
    )  # fmt: skip


async def test_logs_of_a_time_and_of_a_run(site: Site, tmp_path: Path) -> None:
    """kubectl's --timestamps, --since, --since-time and --previous; without the last, only the current run."""
    instance = site.add(restarts=1)
    log = tmp_path / "logs" / f"{instance.name}-app.log"
    path = "/containerLogs/default/web/main"
    begin_run(log)
    log.write_bytes(b"first " + b"x" * 100_000 + b"\n")
    os.utime(log, (1_000_000_000, 1_000_000_000))
    begin_run(log)
    with log.open("ab") as file:
        file.write(b"second \xff " + b"y" * 100_000 + b"\nlast\n")
    assert (await site.get(path)).content == b"second \xff " + b"y" * 100_000 + b"\nlast\n"
    assert (await site.get(f"{path}?previous=true")).text == f"first {'x' * 100_000}\n"
    assert (await site.get(f"{path}?previous=true&tailLines=1&limitBytes=5")).text == "first"
    first, last = (await site.get(f"{path}?timestamps=true")).content.splitlines()
    assert re.fullmatch(rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z last", last)
    assert re.fullmatch(rb"20\S{27}Z second \xff y{100000}", first), "one time, although it comes in pieces"
    assert (await site.get(f"{path}?sinceSeconds=3600")).content.endswith(b"last\n")
    assert (await site.get(f"{path}?sinceTime=2100-01-01T00:00:00%2B01:00")).text == ""
    assert (await site.get(f"{path}?sinceSeconds=9999999999999")).content.endswith(b"last\n")


async def test_followed_logs_end_with_the_program(site: Site, tmp_path: Path) -> None:
    """And bring what was written before its end."""
    instance = site.add()
    log = tmp_path / "logs" / f"{instance.name}-app.log"
    log.write_bytes(b"one\n")
    seen: list[str] = []
    async with httpx.AsyncClient(verify=site.context(), timeout=60) as client:
        url = f"https://127.0.0.1:{site.port}/containerLogs/default/web/main?follow=true"
        async with client.stream("GET", url) as response:
            async for line in response.aiter_lines():
                seen.append(line)
                if line == "one":
                    with log.open("ab") as file:
                        file.write(b"two\n")
                if line == "two":
                    with log.open("ab") as file:
                        file.write(b"three\n")
                    site.end(instance)
    assert seen == ["one", "two", "three"]


async def test_attach_says_why_it_ends(site: Site) -> None:
    instance = site.add()
    del site.world.instances.instances[instance.id]  # the server no longer has it
    async with site.socket("/attach/default/web/main", "v4.channel.k8s.io") as socket:
        (last,) = await socket.receive_all()
        assert (status(last)["status"], status(last)["reason"]) == ("Failure", "InternalError")


@pytest.fixture
def one_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypeman.kube.kubelet.app.MAX_LOGS", 1)


async def test_logs_leave_connections_to_the_heartbeat(one_log: None, site: Site) -> None:
    site.add()
    async with site.socket("/attach/default/web/main", "v4.channel.k8s.io"):
        assert (await site.get("/containerLogs/default/web/main")).status_code == 429
    with trio.fail_after(30):
        while (await site.get("/containerLogs/default/web/main")).status_code != 200:
            await trio.sleep(0.05)


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    """Says back in capitals, and ends with its client."""

    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(bytes(data).upper())

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_forward_by_channels(site: Site) -> None:
    site.add()
    async with echo_server() as port:
        closed = bind_tcp("127.0.0.1", 0)[0]
        unused = closed.getsockname()[1]
        closed.close()
        async with site.socket(f"/portForward/default/web?port={port}&port={unused}", portforward.V4) as socket:
            assert socket.protocol == portforward.V4
            assert [await socket.receive() for _ in range(4)] == [
                bytes([number]) + struct.pack("<H", each) for number, each in enumerate([port, port, unused, unused])
            ]
            refused = await socket.receive()
            assert refused is not None and refused.startswith(b"\x03port ")
            await socket.send(b"\0hello")
            assert await socket.receive() == b"\0HELLO"


async def test_forward_by_a_tunnel(site: Site) -> None:
    """As kubectl does it: an error and a data stream for each connection."""
    site.add()
    deflate = zlib.compressobj(zdict=spdy.DICTIONARY)

    def syn_stream(stream: int, **headers: str) -> bytes:
        plain = struct.pack(">I", len(headers)) + b"".join(
            struct.pack(">I", len(text)) + text.encode() for pair in headers.items() for text in pair
        )
        block = deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)
        body = struct.pack(">IIH", stream, 0, 0) + block
        return struct.pack(">HH", 0x8003, 1) + b"\0" + len(body).to_bytes(3) + body

    def data(stream: int, payload: bytes, fin: bool = False) -> bytes:
        return struct.pack(">I", stream) + bytes([fin]) + len(payload).to_bytes(3) + payload

    async with echo_server() as port, site.socket("/portForward/default/web", portforward.TUNNEL) as socket:
        assert socket.protocol == portforward.TUNNEL
        framer, frames = spdy.Framer(), list[spdy.Data | spdy.Reset]()

        async def next_frame() -> spdy.Data | spdy.Reset:
            while not frames:
                received = await socket.receive()
                assert received is not None
                frames.extend(frame for frame in framer.feed(received) if isinstance(frame, spdy.Data | spdy.Reset))
            return frames.pop(0)

        async def next_data() -> spdy.Data:
            frame = await next_frame()
            assert isinstance(frame, spdy.Data)
            return frame

        for request, number in enumerate((1, 5)):  # two connections, one after another, over one tunnel
            fields = {"port": str(port), "requestid": str(request)}
            await socket.send(syn_stream(number, streamtype="error", **fields) + data(number, b"", fin=True))
            await socket.send(syn_stream(number + 2, streamtype="data", **fields))
            await socket.send(data(number + 2, b"hel") + data(number + 2, b"lo"))
            heard = b""
            while heard != b"HELLO":
                heard += (await next_data()).data
            await socket.send(data(number + 2, b"", fin=True))
            assert await next_data() == spdy.Data(number + 2, b"", fin=True)
            assert await next_data() == spdy.Data(number, b"", fin=True)
        await socket.send(syn_stream(9, streamtype="data", port="0", requestid="9"))
        assert await next_frame() == spdy.Reset(9)
        fields = {"port": "1", "requestid": "10"}
        await socket.send(syn_stream(11, streamtype="error", **fields) + syn_stream(13, streamtype="data", **fields))
        assert await next_data() == spdy.Data(13, b"", fin=True)
        assert (await next_data()).data.startswith(b"port 1 of the guest: ")


async def test_statistics_and_pods(site: Site) -> None:
    instance = site.add()
    summary = (await site.get("/stats/summary")).json() if ("admin", "get", "stats") in MAY else None
    assert summary is None
    MAY.add(("admin", "get", "stats"))
    try:
        summary = (await site.get("/stats/summary")).json()
    finally:
        MAY.discard(("admin", "get", "stats"))
    assert summary["node"]["nodeName"] == "node1"
    assert [pod["podRef"] for pod in summary["pods"]] == [{"name": "web", "namespace": "default", "uid": "uid-web"}]
    assert instance.id
    listed = (await site.get("/pods")).json()
    assert [item["metadata"]["name"] for item in listed["items"]] == ["web"]
