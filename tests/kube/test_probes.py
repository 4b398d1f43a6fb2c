"""Probes of guests that mean harm: each ends, with little memory and an answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import trio

from hypeman.instances.model.types import Instance
from hypeman.kube.local import LocalServer
from hypeman.kube.podspec import Container
from hypeman.kube.probes import passes


async def endless(stream: trio.SocketStream) -> None:
    """A 200 whose body has no end."""
    try:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send_all(b"x" * 4096)
            await trio.sleep(0.01)
    except trio.BrokenResourceError:
        pass


@pytest.mark.parametrize(
    ("action", "good"),
    [
        ({"httpGet": {"port": 0}}, True),
        ({"httpGet": {"port": 0, "path": "/a\nb"}}, False),
        ({"httpGet": {"port": "unknown"}}, False),
        ({"tcpSocket": {"port": "unknown"}}, False),
    ],
)
async def test_a_probe_ends(action: dict[str, Any], good: bool) -> None:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, endless, [listener])
        for each in action.values():
            each["port"] = each["port"] or listener.socket.getsockname()[1]
        container = msgspec.convert(
            {"name": "main", "image": "x", "readinessProbe": {**action, "timeoutSeconds": 5}}, Container
        )
        assert container.readiness_probe is not None
        found = await passes(container.readiness_probe, container, LocalServer("http://host"), instance("127.0.0.1"))
        nursery.cancel_scope.cancel()
    assert found is good


def instance(ip: str) -> Instance:
    network = {"enabled": True, "ip": ip}
    return msgspec.convert(
        {"id": "i1", "name": "web-1", "image": "x", "state": "Running", "network": network,
         "created_at": datetime.now(UTC), "health_status": {"status": "disabled"}},
        Instance,
    )  # fmt: skip
