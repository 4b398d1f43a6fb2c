"""Where the certificate of a name comes from, and what makes it another one."""

from __future__ import annotations

import base64
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import verification
from msgspec import UNSET

from hypeman.errors import InvalidRequest
from hypeman.ingress.certificates.acme_types import CASettings
from hypeman.ingress.certificates.files import CertificateFile
from hypeman.ingress.certificates.internal import LIFETIME, InternalCA
from hypeman.ingress.certificates.names import DomainList, best_match, certificate_name, is_private
from hypeman.ingress.certificates.pem import BadCertificate, read_pair
from hypeman.ingress.certificates.service import Certificates, Settings
from hypeman.ingress.certificates.types import Answer, Pair
from hypeman.ingress.types import CertificateState, IngressMatch, IngressRule, IngressTarget
from hypeman.store import Store
from tests.ingress.certs import make_chain, make_key, pem_of, write_pair

NOW = datetime.now(UTC)


class Carrier:
    """What the data plane was given, and in which order."""

    def __init__(self) -> None:
        self.has: dict[str, Pair] = {}
        self.calls: list[tuple[str, bool]] = []

    async def certify(self, name: str, pair: Pair | None) -> None:
        self.calls.append((name, pair is not None))
        if pair is None:
            del self.has[name]
        else:
            self.has[name] = pair

    async def show(self, name: str, answer: Answer | None) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@asynccontextmanager
async def running(settings: Settings, folder: Path) -> AsyncIterator[tuple[Certificates, Carrier, Clock]]:
    carrier, clock = Carrier(), Clock()
    store = Store.open(folder / "store")
    service = Certificates(settings, folder / "ca", store, now=clock, interval=0.01)
    service.carry(carrier.certify, carrier.show, lambda: (80, 443))
    await service.load()
    async with store.serving(), trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        with trio.fail_after(60):
            yield service, carrier, clock
        nursery.cancel_scope.cancel()
    store.close()


def refusal(service: Certificates, hostname: str) -> tuple[str, str]:
    try:
        service.check(hostname)
    except InvalidRequest as error:
        return error.code, error.message
    return "", ""


# ── Names ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("entries", "names", "others"),
    [
        ("a.com, *.B.com", ("a.com", "x.b.com"), ("b.com", "x.y.b.com", "x.a.com")),
        ("*", ("a.com", "x.y.z"), ()),
        ("", (), ("a.com",)),
    ],
)
def test_the_contracts_list_of_domains(entries: str, names: tuple[str, ...], others: tuple[str, ...]) -> None:
    domains = DomainList.parse(entries)
    assert all(domains.has(name) for name in names)
    assert not any(domains.has(name) for name in others)


@pytest.mark.parametrize("entries", ["a..com", "*.*.com", "{x}.com", "a b"])
def test_a_list_that_means_nothing_is_refused(entries: str) -> None:
    with pytest.raises(ValueError, match=r"label|capture|wildcard"):
        DomainList.parse(entries)


def test_names_of_certificates() -> None:
    assert certificate_name("a.b.com") == "a.b.com"
    assert certificate_name("{x}.b.com") == "*.b.com"
    assert certificate_name("a.{x}.com") is None
    assert best_match(["*.b.com", "a.b.com"], "a.b.com") == "a.b.com"
    assert best_match(["*.b.com"], "a.c.b.com") is None
    assert [
        is_private(name, "vm.lan") for name in ("web", "a.internal", "x.vm.lan", "*.test", "notlocal", "a.com")
    ] == [
        *[True] * 5,
        False,
    ]
    assert not is_private("xinternal.com", "")


# ── Files ────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_wrong_with_a_certificate_is_said_without_its_key() -> None:
    key = make_key()
    chain = make_chain(key, "a.com")
    small, odd = rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256K1())
    for bad_chain, bad_key, said in [
        (b"nothing", pem_of(key), "cannot be read as PEM"),
        (chain.replace(b"M", b"N"), pem_of(key), "cannot be read as PEM"),
        (chain, b"nothing", "key cannot be read as PEM"),
        (chain, pem_of(key, b"secret"), "encrypted"),
        (chain, pem_of(make_key()), "does not belong"),
        (make_chain(key), pem_of(key), "no subject alternative names"),
        (make_chain(small, "a.com"), pem_of(small), "1024 bits"),
        (make_chain(odd, "a.com"), pem_of(odd), "secp256k1"),
        (make_chain(key, "a.com", must_staple=True), pem_of(key), "OCSP stapling"),
        (chain * 1000, pem_of(key), "larger"),
    ]:
        with pytest.raises(BadCertificate, match=said) as caught:
            read_pair(bad_chain, bad_key)
        assert "PRIVATE" not in str(caught.value)
    pair = read_pair(chain, pem_of(key))
    assert pair.names == ("a.com",)
    assert pair.key not in repr(pair)


def test_any_damage_is_a_certificate_that_is_refused() -> None:
    key = make_key()
    chain, secret = make_chain(key, "a.com", "*.b.com"), pem_of(key)
    damage = random.Random(20261129)
    refused = 0
    for _ in range(1500):
        for number, good in enumerate((chain, secret)):
            label = good.split(b"-----")[1].removeprefix(b"BEGIN ")
            data = bytearray(base64.b64decode(b"".join(good.splitlines()[1:-1])))
            data[damage.randrange(len(data))] = damage.randrange(256)
            bad = b"-----BEGIN %b-----\n%b-----END %b-----\n" % (label, base64.encodebytes(data), label)
            try:
                read_pair(*((bad, secret) if number == 0 else (chain, bad)))
            except BadCertificate:
                refused += 1
    assert refused > 1000


def test_files_that_change(tmp_path: Path) -> None:
    paths = write_pair(tmp_path, "a.com")
    file = CertificateFile(*paths)
    assert file.reload()
    first = file.pair
    assert first is not None
    assert not file.reload(), "nothing has changed"
    key = make_key()
    paths[0].write_bytes(make_chain(key, "b.com"))
    assert file.reload(), "the new certificate with the old key"
    assert (file.pair, "does not belong" in file.error) == (first, True)
    assert not file.reload()
    paths[1].write_bytes(pem_of(key))
    assert file.reload()
    assert file.pair is not None
    assert (file.pair.names, file.error) == (("b.com",), "")
    paths[1].unlink()
    assert file.reload()
    assert "cannot be read" in file.error
    os.mkfifo(paths[1])
    assert file.reload(), "a pipe does not make the server wait"
    assert "not a file" in file.error


# ── The internal CA ──────────────────────────────────────────────────────────────────────────────


def test_clients_that_trust_the_root_accept_a_leaf(tmp_path: Path) -> None:
    ca = InternalCA(tmp_path / "ingress")
    root = x509.load_pem_x509_certificate(ca.root().encode())
    store = verification.Store([root])
    long = ".".join(["a" * 60] * 4)
    for issued, name in [("web.internal", "web.internal"), ("*.x.internal", "any.x.internal"), (long, long)]:
        pair = ca.issue(issued, NOW)
        leaf = x509.load_pem_x509_certificate(pair.chain.encode())
        verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName(name)).verify(leaf, [])
        assert read_pair(pair.chain.encode(), pair.key.encode()) == pair
    assert (tmp_path / "ingress/ca.key").stat().st_mode & 0o777 == 0o600
    assert InternalCA(tmp_path / "ingress").root() == ca.root(), "there is one root"


async def test_a_damaged_authority_is_an_error_of_its_names_alone(tmp_path: Path) -> None:
    paths = write_pair(tmp_path, "a.example.com")
    InternalCA(tmp_path / "ca").root()
    (tmp_path / "ca/ca.key").write_bytes(pem_of(make_key()))
    async with running(Settings(files={"site": paths}), tmp_path) as (service, carrier, _):
        await service.use(["web.internal", "a.example.com"])
        state = service.state_of("web.internal")
        assert state.state is CertificateState.FAILED
        assert "does not belong" in str(state.error)
        assert str(tmp_path) not in str(state.error)
        assert set(carrier.has) == {"a.example.com"}
        (tmp_path / "ca/ca.key").write_text("nothing")
        await trio.sleep(0.1)
        assert service.state_of("a.example.com").state is CertificateState.VALID, "it goes on"


# ── The service ──────────────────────────────────────────────────────────────────────────────────


async def test_a_name_gets_a_certificate_and_another_one_in_time(tmp_path: Path) -> None:
    async with running(Settings(internal=DomainList.parse("*.corp.com")), tmp_path) as (service, carrier, clock):
        service.check("web.corp.com")
        await service.use(["web.internal", "{x}.corp.com"])
        assert set(carrier.has) == {"web.internal", "*.corp.com"}
        before = carrier.has["web.internal"]
        state = service.state_of("web.internal")
        assert (state.state, state.source) == (CertificateState.VALID, "internal")
        assert service.state_of("{x}.corp.com").state is CertificateState.VALID
        clock.now += LIFETIME - timedelta(days=1)
        while carrier.has["web.internal"] == before:
            await trio.sleep(0.01)
        assert carrier.has["web.internal"].not_after == (clock.now + LIFETIME).replace(microsecond=0)
        await service.use(["web.internal"])  # by another ingress
        await service.leave(["web.internal", "{x}.corp.com"])
        assert set(carrier.has) == {"web.internal"}
        assert carrier.calls.count(("web.internal", True)) == 2, "one that is in use is not replaced for others"


async def test_files_win_and_are_read_again(tmp_path: Path) -> None:
    paths = write_pair(tmp_path, "web.internal", "*.example.com")
    async with running(Settings(files={"site": paths}), tmp_path) as (service, carrier, clock):
        for hostname in ("web.internal", "{x}.example.com", "a.example.com"):
            service.check(hostname)
        assert refusal(service, "a.b.com")[0] == "config_validation_failed"
        assert refusal(service, "a.{x}.com")[0] == "config_validation_failed"
        await service.use(["web.internal", "a.example.com"])
        before = carrier.has["a.example.com"]
        assert service.state_of("a.example.com").source == "file"
        write_pair(tmp_path, "*.example.com", days=60)
        while carrier.has["a.example.com"] == before or carrier.has["web.internal"] == before:
            await trio.sleep(0.01)
        assert service.state_of("web.internal").source == "internal", "the new file is not for it"
        paths[1].write_text("nothing")
        while service.state_of("a.example.com").error is UNSET:
            await trio.sleep(0.01)
        assert service.state_of("a.example.com").state is CertificateState.VALID, "the last good one stays"
        clock.now += timedelta(days=61)
        assert service.state_of("a.example.com").state is CertificateState.EXPIRED
        assert "expired" in refusal(service, "a.example.com")[1]
        assert "a.example.com" in carrier.has


async def test_unusable_files_are_named_in_the_refusal(tmp_path: Path) -> None:
    files = {"site": (tmp_path / "no.pem", tmp_path / "no.key")}
    async with running(Settings(files=files), tmp_path) as (service, carrier, _):
        assert f"{tmp_path}/no.pem cannot be read" in refusal(service, "a.com")[1]
        await service.use(["a.com"])  # an ingress from before
        assert service.state_of("a.com").state is CertificateState.FAILED
        assert not carrier.has
    async with running(Settings(internal=DomainList.parse("b.com")), tmp_path) as (service, _, _):
        assert refusal(service, "a.com")[0] == "domain_not_allowed"
    async with running(Settings(), tmp_path) as (service, _, _):
        assert refusal(service, "a.com")[0] == "config_validation_failed"


async def test_what_may_be_asked_of_a_public_ca(tmp_path: Path) -> None:
    settings = Settings(ca=CASettings("https://ca.example.com/"), allowed=DomainList.parse("*.a.com, b.com"))
    async with running(settings, tmp_path) as (service, _, _):
        for hostname, code, said in [
            ("x.a.com", "", ""),
            ("b.com", "", ""),
            ("x.y.a.com", "domain_not_allowed", "acme.allowed_domains"),
            ("c.com", "domain_not_allowed", "acme.allowed_domains"),
            ("{x}.a.com", "config_validation_failed", "is a pattern"),
            ("my_site.a.com", "config_validation_failed", "underscore"),
            ("web.internal", "", ""),
        ]:
            found, message = refusal(service, hostname)
            assert (found, said in message) == (code, True), hostname
        for hostname, port, more in [("b.com", 443, set()), ("b.com", 8443, {80}), ("web.internal", 8443, set())]:
            match = IngressMatch(hostname=hostname, port=port)
            rule = IngressRule(match=match, target=IngressTarget(instance="web", port=1), tls=True)
            assert service.ports_for(rule) == more
