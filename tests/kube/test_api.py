"""The client of the API server: connections with certificates that have been replaced."""

from __future__ import annotations

import os
from pathlib import Path

from hypeman.kube.api import ApiClient
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
