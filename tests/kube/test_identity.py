"""The node's own certificate: an expired one does not prevent fencing."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import yaml

from hypeman.config import Config, NodeConfig
from hypeman.kube import manifest, names, node
from hypeman.kube.identity import find_access
from hypeman.kube.lease import LeaseClock, boot_time
from hypeman.kube.local import LocalServer
from tests.kube.fake_host import FakeHost


@pytest.fixture
def settings(tmp_path: Path) -> NodeConfig:
    """Of a node that has joined with a bootstrap token; nothing listens at its API server's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bootstrap = tmp_path / "bootstrap"
    kubeconfig = manifest.bootstrap_kubeconfig(f"http://127.0.0.1:{port}", b"no CA", "token")
    bootstrap.write_text(yaml.safe_dump(kubeconfig))
    return NodeConfig(
        name="here",
        kubeconfig=str(tmp_path / "none"),
        bootstrap_kubeconfig=str(bootstrap),
        state_dir=str(tmp_path),
        fence_after=50.0,
    )


async def test_without_a_certificate_vms_are_fenced(settings: NodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program was started while the host was cut off, and its certificate has ended: it cannot get another one."""
    host = FakeHost()
    host.instances["i1"] = {
        "id": "i1", "name": "web-1", "image": "x", "state": "Running", "created_at": datetime.now(UTC).isoformat(),
        "health_status": {"status": "disabled"},
        "tags": {names.NODE: "here", names.SELF: "web-1", names.POD_UID: "u1", names.FENCING: "standby"},
    }  # fmt: skip
    LeaseClock(40, boot_time, Path(settings.state_dir) / "heartbeat").renewed(boot_time())
    monkeypatch.setattr(node, "build_parts", partial(node.build_parts, clock=lambda: boot_time() + 1000))
    monkeypatch.setattr("hypeman.kube.fencing.FIRST_SECONDS", 0.0)
    monkeypatch.setattr(node, "LocalServer", lambda *_: LocalServer("http://host", transport=host))
    config = msgspec.structs.replace(Config(), node=settings)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.run, config)
        with trio.fail_after(60):
            while host.instances["i1"]["state"] != "Standby":
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


def test_what_the_node_uses_when(settings: NodeConfig) -> None:
    """Its own certificate, never the bootstrap token, which asks for that certificate."""
    access, first = find_access(settings)
    assert (access.token, access.certificate_file) == ("", str(Path(settings.state_dir) / "client.pem"))
    assert first is not None and first.token == "token"
