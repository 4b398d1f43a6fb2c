"""Webhooks against a real TLS receiver: signed, in order, repeated, continued after a restart."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import h11
import msgspec
import pytest
import trio
import trustme

from hypeman import events
from hypeman.config import ConfigError, WebhookConfig, load_config
from hypeman.events import log, webhooks
from hypeman.events.service import Events
from hypeman.events.signing import key_of, signed_headers
from hypeman.events.types import Kind
from hypeman.events.webhooks import WEBHOOKS, WebhookError, Webhooks
from hypeman.host.checked_backend import is_allowed
from hypeman.store import Store

SECRET = "whsec_" + base64.b64encode(b"a key of twenty-four byt").decode()


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of the specification of Standard Webhooks."""
    body = b'{"event_type":"ping","data":{"success":true}}'
    found = signed_headers(key_of("whsec_plJ3nmyCDGBKInavdOK15jsl"), "msg_loFOjxBNrRLzqYUf", 1731705121, body)
    assert found["webhook-signature"] == "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0="


class Receiver:
    """Answers deliveries with ``answers`` in turn, then with 204."""

    def __init__(self) -> None:
        self.answers: list[int | None] = []
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.authority = trustme.CA()
        self.url = ""

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}/hook?x=1"
        tls = trio.SSLListener(listener, context, https_compatible=True)
        task_status.started()
        await trio.serve_listeners(self._handle, [tls])

    async def _handle(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        connection, body = h11.Connection(h11.SERVER), b""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some()))
                elif isinstance(event, h11.Request):
                    assert (event.method, event.target) == (b"POST", b"/hook?x=1")
                    headers = {name.decode(): value.decode() for name, value in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    self.received.append((headers, body))
                    status = self.answers.pop(0) if self.answers else 204
                    if status is None:
                        return
                    reply = h11.Response(status_code=status, headers=[("content-length", "0"), ("location", "/other")])
                    data = connection.send(reply)
                    await stream.send_all((data or b"") + (connection.send(h11.EndOfMessage()) or b""))
                    connection.start_next_cycle()
                    body = b""
                else:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    def ids(self) -> list[str]:
        return [json.loads(body)["object"]["id"] for _, body in self.received]

    async def wait(self, count: int) -> None:
        with trio.fail_after(20):
            while len(self.received) < count:
                await trio.sleep(0.01)


class Lab:
    def __init__(self, directory: Path, receiver: Receiver) -> None:
        self.directory = directory
        self.receiver = receiver
        self.ca_file = directory / "ca.pem"
        receiver.authority.cert_pem.write_to_path(str(self.ca_file))

    def config(self, **fields: Any) -> WebhookConfig:
        given = {"url": self.receiver.url, "secret": SECRET, "ca_file": str(self.ca_file), "allow_private": True}
        return msgspec.convert({**given, **fields}, WebhookConfig)

    @asynccontextmanager
    async def server(self, **fields: Any) -> AsyncIterator[Callable[..., Any]]:
        """A server with one webhook; yields a function that records events."""
        store = Store.open(self.directory / "store")
        async with store.serving(), trio.open_nursery() as nursery:
            service = Events(store, max_count=fields.pop("max_count", 1000), max_age=timedelta(days=1))
            await nursery.start(service.run)
            hooks = Webhooks(store, service, {"ops": self.config(**fields)})
            nursery.start_soon(hooks.run)
            while store.read(lambda txn: txn.get(WEBHOOKS, "ops")) is None:
                await trio.sleep(0.01)

            async def add(*names: str, kind: Kind = Kind.VOLUME) -> None:
                for name in names:
                    await store.write(partial(events.record, kind=kind, action="created", id=name))

            yield add
            nursery.cancel_scope.cancel()
        self.cursor = (Store.read(store, lambda txn: txn.get(WEBHOOKS, "ops")) or webhooks.WebhookRow(0)).cursor
        store.close()


@pytest.fixture
async def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    monkeypatch.setattr(webhooks, "FIRST_PAUSE", 0.01)
    receiver = Receiver()
    async with trio.open_nursery() as nursery:
        await nursery.start(receiver.serve)
        yield Lab(tmp_path, receiver)
        nursery.cancel_scope.cancel()


async def test_deliveries_are_signed_and_in_order(lab: Lab) -> None:
    async with lab.server() as add:
        await add(*"abc")
        await lab.receiver.wait(3)
    assert lab.receiver.ids() == ["a", "b", "c"]
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    for headers, body in lab.receiver.received:
        content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        wanted = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
        assert headers["webhook-signature"] == f"v1,{wanted}"
        assert headers["content-type"] == "application/json"
    assert len({headers["webhook-id"] for headers, _ in lab.receiver.received}) == 3
    assert json.loads(lab.receiver.received[0][1])["type"] == "volume.created"


async def test_what_is_refused_is_repeated_and_holds_up_what_follows(lab: Lab) -> None:
    """A broken connection, an error and a redirect are all failures."""
    lab.receiver.answers = [None, 500, 302, 204]
    async with lab.server() as add:
        await add("a", "b")
        await lab.receiver.wait(5)
    assert lab.receiver.ids() == ["a", "a", "a", "a", "b"]
    ids = [headers["webhook-id"] for headers, _ in lab.receiver.received]
    assert len(set(ids[:4])) == 1 and ids[4] != ids[0]


async def test_what_is_never_accepted_is_skipped(lab: Lab) -> None:
    lab.receiver.answers = [500, 204]
    async with lab.server(retry_hours=0) as add:
        await add("a", "b")
        await lab.receiver.wait(2)
    assert lab.receiver.ids() == ["a", "b"]


async def test_a_receiver_that_is_gone_is_left_alone(lab: Lab) -> None:
    lab.receiver.answers = [410]
    async with lab.server() as add:
        await add("a", "b")
        await lab.receiver.wait(1)
        await trio.testing.wait_all_tasks_blocked(0.1)
    assert lab.receiver.ids() == ["a"]


async def test_delivery_continues_after_a_restart(lab: Lab) -> None:
    """Also of what happened while nobody delivered; what was delivered is not repeated."""
    async with lab.server() as add:
        await add("a")
        await lab.receiver.wait(1)
        await trio.testing.wait_all_tasks_blocked(0.1)
        await add(kind=Kind.IMAGE)
    lab.receiver.answers = [500] * 3
    async with lab.server() as add:
        await add("b")
        await lab.receiver.wait(2)
    lab.receiver.answers = []
    async with lab.server() as add:
        await add("c")
        with trio.fail_after(20):
            while lab.receiver.ids()[-1] != "c":
                await trio.sleep(0.01)
    distinct = list(dict.fromkeys(lab.receiver.ids()))
    assert distinct == ["a", "b", "c"]
    assert lab.receiver.ids().count("a") == 1


async def test_events_that_were_dropped_first_are_not_waited_for(lab: Lab) -> None:
    lab.receiver.answers = [500] * 4
    async with lab.server(max_count=3) as add:
        await add("a")
        await lab.receiver.wait(1)
        await add(*"bcdefg")
        await lab.receiver.wait(8)
    assert lab.receiver.ids()[-3:] == ["e", "f", "g"]


async def test_only_wanted_events(lab: Lab) -> None:
    async with lab.server(types=["image"]) as add:
        await add("a")
        await add("i", kind=Kind.IMAGE)
        await lab.receiver.wait(1)
    assert lab.receiver.ids() == ["i"]


async def test_private_receivers_and_unknown_certificates_are_refused(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    for fields in ({"allow_private": False}, {"ca_file": ""}):
        async with lab.server(retry_hours=0, **fields) as add:
            await add("a")
            await trio.testing.wait_all_tasks_blocked(0.1)
    assert lab.receiver.received == []
    assert "certificate verify failed" in caplog.text


@pytest.mark.parametrize(
    ("address", "public", "private"),
    [
        ("1.1.1.1", True, True), ("2606:4700::1111", True, True), ("10.0.0.1", False, True), ("127.0.0.1", False, True),
        ("100.64.0.1", False, True), ("::1", False, True), ("fd00::1", False, True), ("169.254.169.254", False, False),
        ("::ffff:169.254.169.254", False, False), ("fe80::1%eth0", False, False), ("0.0.0.0", False, False),
        ("224.0.0.1", False, False), ("::ffff:10.0.0.1", False, True),
        ("64:ff9b::a9fe:a9fe", False, False), ("::127.0.0.1", False, False), ("::ffff:0:7f00:1", False, False),
        ("fec0::1", False, False),
    ],
)  # fmt: skip
def test_which_addresses_are_allowed(address: str, public: bool, private: bool) -> None:
    assert (is_allowed(address, private=False), is_allowed(address, private=True)) == (public, private)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"url": "http://example.com"}, "https"),
        ({"url": "ftp://example.com"}, "url"),
        ({"url": "https://user:pass@example.com/"}, "url"),
        ({"secret": "short"}, "secret"),
        ({"kinds": ["image"]}, "kinds"),
    ],
)
def test_bad_settings_stop_the_start(tmp_path: Path, fields: dict[str, Any], text: str) -> None:
    hook = {"url": "https://example.com/", "secret": "x" * 16, **fields}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"events": {"webhooks": {"ops": hook}}}))
    with pytest.raises(ConfigError, match=text):
        load_config(file, {})


@pytest.mark.parametrize("fields", [{"secret": "whsec_no base64 at all"}, {"ca_file": "/nowhere"}, {"types": ["bird"]}])
async def test_unusable_settings_stop_the_start_too(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = msgspec.convert({"url": "https://example.com/", "secret": "x" * 16, **fields}, WebhookConfig)
    store = Store.open(tmp_path / "store")
    with pytest.raises(WebhookError, match=r"events\.webhooks\.ops"):
        Webhooks(store, Events(store, max_count=100, max_age=timedelta(days=1)), {"ops": config})
    assert store.read(log.head).last == 0
    store.close()
