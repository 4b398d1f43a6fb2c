"""Certificates by request: approved, denied, renewed, and kept over a restart."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from hypeman.kube.api import ApiClient, Refused, Unreachable
from hypeman.kube.kubelet import certificates
from hypeman.kube.kubelet.certificates import (
    CLIENT_SIGNER,
    SERVING_SIGNER,
    Identity,
    Keeper,
    Pair,
    Refusal,
    new_key,
    self_signed,
)

SERVING = Identity("node1", SERVING_SIGNER, dns=("node1",), addresses=("10.0.0.1",))
CLIENT = Identity("node1", CLIENT_SIGNER)


class Cluster(ApiClient):
    """Signs what is requested, as configured."""

    def __init__(self, *, life: timedelta = timedelta(days=1)) -> None:
        self.requests: list[dict[str, Any]] = []
        self.asked_at: list[float] = []
        self.conditions: list[dict[str, str]] = []
        self.fails = 0
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self._life = life
        self._key = new_key()

    async def create(self, path: str, body: Any, kind: type[Any]) -> Any:
        await trio.lowlevel.checkpoint()
        if self.fails:
            self.fails -= 1
            raise Unreachable("no answer")
        self.requests.append(body)
        self.asked_at.append(trio.current_time())
        return msgspec.convert({"metadata": {"name": f"csr-{len(self.requests)}"}}, kind)

    async def get(self, path: str, kind: type[Any]) -> Any:
        await trio.lowlevel.checkpoint()
        if self.conditions:
            return msgspec.convert({"status": {"conditions": self.conditions}}, kind)
        pem = base64.b64encode(self._sign(self.requests[-1])).decode()
        return msgspec.convert({"status": {"certificate": pem}}, kind)

    def _sign(self, body: dict[str, Any]) -> bytes:
        request = x509.load_pem_x509_csr(base64.b64decode(body["spec"]["request"]))
        assert request.is_signature_valid
        now = self.clock()
        builder = (
            x509.CertificateBuilder()
            .subject_name(request.subject)
            .issuer_name(x509.Name([]))
            .public_key(request.public_key())
            .serial_number(len(self.requests))
            .not_valid_before(now)
            .not_valid_after(now + self._life)
        )
        for extension in request.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


async def test_a_request_is_what_the_cluster_signs_for_nodes(autojump_clock: trio.testing.MockClock) -> None:
    cluster, names = Cluster(), list[str]()
    pair = await certificates.request(cluster, SERVING, on_waiting=names.append)
    assert names == ["csr-1"]
    assert pair.covers(SERVING)
    [body] = cluster.requests
    assert body["spec"]["signerName"] == "kubernetes.io/kubelet-serving"
    assert list(body["spec"]["usages"]) == ["digital signature", "server auth"]
    await certificates.request(cluster, CLIENT, on_waiting=names.append)
    request = x509.load_pem_x509_csr(base64.b64decode(cluster.requests[1]["spec"]["request"]))
    assert request.subject.rfc4514_string() == "CN=system:node:node1,O=system:nodes"
    assert list(request.extensions) == [], "the signer of clients refuses names"
    assert list(cluster.requests[1]["spec"]["usages"]) == ["digital signature", "client auth"]


async def test_a_denied_request_is_reported(autojump_clock: trio.testing.MockClock) -> None:
    cluster = Cluster()
    cluster.conditions = [{"type": "Denied", "message": "not this host"}]
    with pytest.raises(Refusal, match="csr-1 is denied: not this host"):
        await certificates.request(cluster, CLIENT, on_waiting=lambda name: None)


async def test_a_pair_is_kept_and_renewed(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Over a restart the pair of the file is used; near its end there is a new one; failures are retried."""
    path = tmp_path / "serving.pem"
    cluster, used = Cluster(life=timedelta(hours=1)), list[Pair]()
    first = await Keeper(cluster, SERVING, path, used.append).renew()
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = Keeper(cluster, SERVING, path, used.append).load()
    assert loaded is not None and loaded.certificate == first.certificate
    cluster.fails = 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Keeper(cluster, SERVING, path, used.append, now=moving_clock()).run)
        with trio.fail_after(10**8):
            while len(used) < 2:
                await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert 0.6 < (cluster.asked_at[1] - cluster.asked_at[0]) / 3600 < 1.0
    assert used[1].certificate.serial_number == 2
    assert path.read_bytes() == used[1].pem


def moving_clock(ahead: float = 0.0) -> Callable[[], datetime]:
    """This host's clock, which goes with Trio's."""
    begin, start = datetime.now(UTC) + timedelta(seconds=ahead), trio.current_time()
    return lambda: begin + timedelta(seconds=trio.current_time() - start)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("days", [-30, 30])
async def test_a_clock_that_is_off_neither_floods_the_cluster_nor_lets_a_certificate_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, days: int, known: bool
) -> None:
    """Certificates of a day, and a clock that is a month off: if it is known to be, they are renewed in their time."""

    async def at_once(function: Callable[..., Any], *given: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*given)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)  # the clock would jump while a thread works
    cluster = Cluster(life=timedelta(days=1))
    cluster.clock = moving_clock()
    cluster.clock_ahead = days * 86400.0 if known else 0.0
    keeper = Keeper(cluster, CLIENT, tmp_path / "client.pem", lambda pair: None, now=moving_clock(days * 86400.0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await trio.sleep(86399)
        nursery.cancel_scope.cancel()
    count = len(cluster.requests)
    if known:
        assert count == 2, "the first one, and its renewal within the day"
    else:
        assert 1 <= count <= 86400 / certificates.MIN_LIFE_SECONDS


async def test_a_pair_that_ended_by_a_wrong_clock_only_is_used_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """So far off that the API server's certificate counts as ended as well; then the clock is set."""
    path = tmp_path / "serving.pem"
    cluster, used = Cluster(), list[Pair]()
    first = await Keeper(cluster, SERVING, path, used.append).renew()
    cluster.fails = 3
    keeper = Keeper(
        cluster, SERVING, path, used.append,
        now=lambda: datetime.now(UTC) + timedelta(days=400 if cluster.fails > 1 else 0),
    )  # fmt: skip
    assert keeper.load() is None
    await keeper.obtain()
    assert [pair.certificate for pair in used] == [first.certificate] * 2
    assert len(cluster.requests) == 1, "no administrator has to approve another one"


@pytest.mark.parametrize(("ahead", "told"), [(0.0, False), (3 * 86400.0, False), (-3 * 86400.0, True)])
async def test_a_token_that_ended_by_a_wrong_clock_is_told(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, ahead: float, told: bool
) -> None:
    """Another one from `hypeman node join` would have ended as well, until the clock is set."""

    class Stranger(Cluster):
        async def create(self, path: str, body: Any, kind: type[Any]) -> Any:
            await trio.lowlevel.checkpoint()
            raise Refused("POST: 401 Unauthorized", code=401, reason="Unauthorized")

    first = Stranger()
    first.clock_ahead = ahead
    with trio.move_on_after(1):
        await Keeper(Cluster(), CLIENT, tmp_path / "client.pem", lambda pair: None, first=first).obtain()
    assert "`hypeman node join` writes a new one" in caplog.text
    assert ("this host's clock is 259200 s behind the API server's" in caplog.text) is told


@pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(SERVING, node="node2"),
        msgspec.structs.replace(SERVING, addresses=("10.0.0.2",)),
        msgspec.structs.replace(SERVING, dns=("node1", "node1.example")),
    ],
)
def test_a_pair_for_other_names_is_not_used(tmp_path: Path, other: Identity) -> None:
    path = tmp_path / "serving.pem"
    certificates.store(path, self_signed(SERVING).pem)
    keep = Keeper(Cluster(), SERVING, path, lambda pair: None)
    assert keep.load() is not None
    assert Keeper(Cluster(), other, path, lambda pair: None).load() is None


def test_a_file_that_cannot_be_used_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "serving.pem"
    for content in (b"", b"no certificate", self_signed(SERVING).pem[:100]):
        path.write_bytes(content)
        assert certificates.load(path, datetime.now(UTC)) is None
