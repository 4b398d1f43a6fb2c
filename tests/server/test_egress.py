"""The egress path over HTTP: the CA, the policy, requests as events."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import trio

from hypeman.egress.types import EgressRecord
from tests.fakes.services import FakeWorld


def record(status: int) -> EgressRecord:
    return EgressRecord(
        time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), kind="request", host="api.example.com", port=443,
        method="GET", status=status, reason="ok", injected=True, credentials=("API_KEY",), bytes_up=1, bytes_down=2,
        ms=3.5, http=2,
    )  # fmt: skip


@pytest.fixture
def mediated(world: FakeWorld) -> FakeWorld:
    """``web`` has a policy, ``plain`` has none."""
    world.egress.allow(world.instances.add("web"))
    world.instances.add("plain")
    world.egress.records["web"] = [record(200), record(201)]
    return world


async def test_ca(ask: Any) -> None:
    response = await ask("GET", "/egress/ca.pem")
    assert (response.status_code, response.content_type) == (200, "application/x-pem-file")
    assert (await response.get_data()).startswith(b"-----BEGIN CERTIFICATE-----")


async def test_policy(ask: Any, mediated: FakeWorld) -> None:
    policy = await (await ask("GET", "/instances/web/egress")).get_json()
    assert policy["mode"] == "all"
    assert policy["credentials"] == {
        "API_KEY": {
            "source": {"env": "REAL_KEY"},
            "inject": [
                {
                    "as": {"header": "Authorization", "format": "Bearer ${value}"},
                    "hosts": ["api.example.com"],
                    "ports": None,
                }
            ],
        }
    }


@pytest.mark.parametrize("path", ["egress", "egress/requests", "egress/requests?follow=true"])
async def test_an_instance_without_mediated_egress(ask: Any, mediated: FakeWorld, path: str) -> None:
    response = await ask("GET", f"/instances/plain/{path}")
    assert (response.status_code, (await response.get_json())["code"]) == (404, "no_egress_policy")
    assert (await ask("GET", f"/instances/missing/{path}")).status_code == 404


@pytest.mark.parametrize(("query", "statuses"), [("", [200, 201]), ("?tail=1", [201]), ("?tail=0", [])])
async def test_requests_from_before(ask: Any, mediated: FakeWorld, query: str, statuses: list[int]) -> None:
    response = await ask("GET", f"/instances/web/egress/requests{query}")
    assert response.content_type == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    events = (await response.get_data()).decode().split("\n\n")
    assert events.pop() == ""
    document = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [one["status"] for one in document] == statuses
    for one in document:
        assert (one["time"], one["credentials"]) == ("2026-01-02T03:04:05Z", ["API_KEY"])
    assert mediated.egress.streams[0].closed


async def test_a_follower_on_a_socket(served: Any, mediated: FakeWorld) -> None:
    """The head comes at once, each record as it is made; the stream is closed when the client leaves."""
    stream = await trio.open_unix_socket(served.socket_path)
    got = b""

    async def until(mark: bytes) -> None:
        nonlocal got
        while mark not in got:
            piece = await stream.receive_some()
            assert piece
            got += piece

    with trio.fail_after(20):
        async with stream:
            await stream.send_all(
                b"GET /instances/web/egress/requests?follow=true&tail=0 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            await until(b"\r\n\r\n")
            for status in (210, 211):
                mediated.egress.new.send_nowait(record(status))
                await until(b'"status":%d' % status)
        while not mediated.egress.streams[0].closed:
            await trio.sleep(0.01)


async def test_checking_and_learning(ask: Any, mediated: FakeWorld) -> None:
    found = await (
        await ask("GET", "/instances/web/egress/check?url=https://api.example.com:8443/v1&method=post")
    ).get_json()
    assert found == {
        "method": "POST", "scheme": "https", "host": "api.example.com", "port": 8443, "decision": "deny",
        "rule": "default", "reason": "port_denied", "observed": False, "resolves": True,
    }  # fmt: skip
    assert (await ask("GET", "/instances/web/egress/check?url=nonsense")).status_code == 400
    proposal = await (await ask("GET", "/instances/web/egress/proposal")).get_json()
    assert proposal["rules"] == [
        {"action": "allow", "hosts": ["api.example.com"], "ports": [443], "methods": ["GET"]}
    ]  # fmt: skip
    for path in ("check?url=https://a.b", "proposal", "approvals"):
        assert (await ask("GET", f"/instances/plain/egress/{path}")).status_code == 404


async def test_approvals(ask: Any, mediated: FakeWorld) -> None:
    instance = mediated.instances.find("web")
    paths = "/instances/web/egress/approvals"
    for verb, body, seconds in (("approve", None, 0), ("deny", {}, 0), ("approve", {"for": "10m"}, 600)):
        mediated.egress.hold(instance)
        [held] = await (await ask("GET", paths)).get_json()
        assert (held["id"], held["rule"], held["path"]) == ("a1", "writes", "/v1/x")
        assert await (await ask("GET", "/egress/approvals")).get_json() == [held]
        response = await ask("POST", f"{paths}/a1/{verb}", **({} if body is None else {"json": body}))
        assert response.status_code == 200
        assert mediated.egress.decided.pop() == ("a1", verb == "approve", seconds)
        assert (await ask("POST", f"{paths}/a1/{verb}")).status_code == 404
    for wrong in ({"for": "soon"}, {"for": "9999h"}):
        mediated.egress.hold(instance)
        assert (await ask("POST", f"{paths}/a1/deny", json=wrong)).status_code == 400
    assert mediated.egress.decided == []
