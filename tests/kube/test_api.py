"""The client of the API server: connections with certificates that have been replaced, or that cannot be used."""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme

from hypeman.kube.api import ApiClient, Unreachable
from hypeman.kube.credentials import Access
from hypeman.kube.types import Pod
from tests.kube.fake_cluster import FakeCluster

PODS = "/api/v1/pods"


async def test_a_client_with_old_certificates_is_closed_with_its_last_request(tmp_path: Path) -> None:
    file = tmp_path / "ca"
    file.touch()
    api = ApiClient(Access(server="http://cluster", ca_file=str(file)), FakeCluster())
    listed = await api.list(PODS, Pod)
    clients = [api._client]
    async with api.watch(PODS, Pod, listed.version):
        for number in range(4):
            os.utime(file, ns=(number, number))
            await api.list(PODS, Pod)
            clients.append(api._client)
        assert [client is not None and client.is_closed for client in clients] == [False, True, True, True, False]
    assert [client is not None and client.is_closed for client in clients] == [True, True, True, True, False]
    await api.aclose()
    assert clients[-1] is not None and clients[-1].is_closed


@pytest.mark.parametrize(
    ("not_after", "known", "why"),
    [
        (None, False, "unable to get local issuer certificate"),
        (datetime(2020, 1, 1, tzinfo=UTC), True, "certificate has expired"),
    ],
)
async def test_why_a_certificate_is_refused(tmp_path: Path, not_after: datetime | None, known: bool, why: str) -> None:
    """With the time that the host believes it is, if that is the matter."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", not_after=not_after).configure_cert(context)
    file = tmp_path / "ca.pem"
    (authority if known else trustme.CA()).cert_pem.write_to_path(str(file))

    async def handle(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_ssl_over_tcp, handle, 0, context, host="127.0.0.1"))
        port = listener.transport_listener.socket.getsockname()[1]
        api = ApiClient(Access(server=f"https://127.0.0.1:{port}", ca_file=str(file)))
        with pytest.raises(Unreachable) as refused:
            await api.list(PODS, Pod)
        await api.aclose()
        nursery.cancel_scope.cancel()
    assert why in refused.value.message
    assert ("by this host's clock, at which it is 20" in refused.value.message) is (not_after is not None)
