"""The node's certificates, requested from the cluster and renewed before they end.

    client     system:node:NAME in system:nodes, signed by kubernetes.io/kube-apiserver-client-kubelet: who this node is
               to the API server. The first one is requested with a bootstrap token; the cluster approves it by itself.
    serving    for the kubelet's API, signed by kubernetes.io/kubelet-serving. An administrator approves it
               (`kubectl certificate approve`); until then the node presents one that it signed itself.

Keys are made here, kept with mode 0600 in the state directory and never sent. A certificate is replaced together with
its key, in one file: a crash leaves the old pair or the new one.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from hypeman.errors import HypemanError
from hypeman.instances.model.phases import utc_now
from hypeman.kube.api import ApiClient, ApiError, Refused
from hypeman.kube.capacity import MAX_SKEW, difference
from hypeman.kube.types import ObjectMeta

log = logging.getLogger(__name__)

PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
CLIENT_SIGNER = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING_SIGNER = "kubernetes.io/kubelet-serving"
POLL_SECONDS = 2.0
REQUEST_SECONDS = 15 * 60.0
"""A request that is not answered in this time is repeated: the cluster forgets requests after an hour."""
RETRY_SECONDS = 30.0
LOOK_SECONDS = 3600.0
MIN_LIFE_SECONDS = 600.0
"""A certificate is used for at least so long, also if it counts as old at once, because this host's clock is ahead."""
_SELF_SIGNED_DAYS = 365


class Refusal(HypemanError):
    """The cluster denied a certificate, or could not sign it."""

    status = 403


class _Condition(Struct, frozen=True):
    type: str
    message: str = ""
    reason: str = ""


class _RequestStatus(Struct, frozen=True):
    certificate: str = ""
    """Base64 of PEM."""
    conditions: tuple[_Condition, ...] = ()


class _Request(Struct, frozen=True):
    metadata: ObjectMeta = ObjectMeta()
    status: _RequestStatus = _RequestStatus()


class Identity(Struct, frozen=True):
    """What a certificate is requested for."""

    node: str
    signer: str
    dns: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    @property
    def usages(self) -> tuple[str, str]:
        return "digital signature", "server auth" if self.signer == SERVING_SIGNER else "client auth"

    @property
    def subject(self) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"system:node:{self.node}"),
            ]
        )

    def names(self) -> list[x509.GeneralName]:
        addresses = [x509.IPAddress(ipaddress.ip_address(each)) for each in self.addresses]
        return [*(x509.DNSName(each) for each in self.dns), *addresses]


class Pair(Struct, frozen=True):
    """A certificate and its key, as one PEM file."""

    pem: bytes
    certificate: x509.Certificate

    def __repr__(self) -> str:
        return f"Pair({self.certificate.subject.rfc4514_string()!r})"

    @classmethod
    def parse(cls, pem: bytes) -> Pair:
        """Raises ValueError."""
        return cls(pem, x509.load_pem_x509_certificate(pem))

    def renew_at(self, fraction: float) -> datetime:
        """``fraction`` of its life after its beginning."""
        begin, end = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        return begin + (end - begin) * fraction

    def covers(self, identity: Identity) -> bool:
        """Whether it is for this node and these names."""
        if self.certificate.subject != identity.subject:
            return False
        wanted = {(type(name), name.value) for name in identity.names()}
        try:
            found = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return not wanted
        return wanted <= {(type(name), name.value) for name in found}


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def render_request(key: ec.EllipticCurvePrivateKey, identity: Identity) -> dict[str, object]:
    """The CertificateSigningRequest."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(identity.subject)
    if names := identity.names():
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    spec = {
        "request": base64.b64encode(pem).decode(),
        "signerName": identity.signer,
        "usages": identity.usages,
    }
    kind = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
    return {**kind, "metadata": {"generateName": "hypeman-node-"}, "spec": spec}


def self_signed(identity: Identity) -> Pair:
    """For the time until the cluster has signed one."""
    key, now = new_key(), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(identity.subject)
        .issuer_name(identity.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_SELF_SIGNED_DAYS))
        .add_extension(x509.SubjectAlternativeName(identity.names()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return Pair.parse(_together(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), key))


async def request(api: ApiClient, identity: Identity, *, on_waiting: Callable[[str], object]) -> Pair:
    """A new pair, once the cluster has approved and signed it. ``on_waiting`` is called with the request's name.

    Raises Refusal, ApiError, trio.TooSlowError.
    """
    key = new_key()
    made = await api.create(PATH, render_request(key, identity), _Request)
    on_waiting(made.metadata.name)
    with trio.fail_after(REQUEST_SECONDS):
        while True:
            found = await api.get(f"{PATH}/{made.metadata.name}", _Request)
            for condition in found.status.conditions:
                if condition.type in ("Denied", "Failed"):
                    why = condition.message or condition.reason
                    raise Refusal(f"the certificate request {made.metadata.name} is {condition.type.lower()}: {why}")
            if found.status.certificate:
                return Pair.parse(_together(base64.b64decode(found.status.certificate), key))
            await trio.sleep(POLL_SECONDS)


class Keeper:
    """Keeps one pair in a file valid; ``use`` is called with each new one."""

    def __init__(
        self,
        api: ApiClient,
        identity: Identity,
        path: Path,
        use: Callable[[Pair], object],
        *,
        first: ApiClient | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """``first`` requests it while there is no valid one, if ``api`` cannot without; ``now``: this host's clock."""
        self._api = api
        self._first = first
        self._clock = now
        self._identity = identity
        self._path = path
        self._use = use
        self._fraction = random.uniform(0.7, 0.9)  # noqa: S311 (spreads the renewals of many nodes)

    def load(self) -> Pair | None:
        """The pair of the file if it can be used."""
        pair = load(self._path, self._now())
        return pair if pair is not None and pair.covers(self._identity) else None

    async def obtain(self) -> None:
        """Return once there is a pair."""
        if self.load() is None:
            await self.renew()

    async def run(self) -> None:
        """Renew until cancelled. Failures are logged and retried."""
        while True:
            pair = self.load()
            if pair is not None:
                await self._wait_due(pair)
            await self.renew()
            await trio.sleep(MIN_LIFE_SECONDS)

    async def _wait_due(self, pair: Pair) -> None:
        """Until it is time to renew ``pair``. Asked again and again: the clock may be set, or be known to be off."""
        while True:
            left = self._left(pair)
            if left <= 0:
                return
            await trio.sleep(min(left, LOOK_SECONDS))

    def _left(self, pair: Pair) -> float:
        """Seconds until it is time to renew ``pair``."""
        return (pair.renew_at(self._fraction) - self._now()).total_seconds()

    def _now(self) -> datetime:
        """By the API server's clock, as far as it is known: that decides what is valid."""
        return self._clock() - timedelta(seconds=self._api.clock_ahead)

    async def renew(self) -> Pair:
        """A new pair, stored and in use.

        The old one, if it turns out to be good while there is no new one: with a clock that is far off there is no API
        server either, and a new certificate for serving waits for an administrator.
        """
        while True:
            api = self._api if self._first is None or self.load() is not None else self._first
            try:
                pair = await request(api, self._identity, on_waiting=self._say_waiting)
                await trio.to_thread.run_sync(store, self._path, pair.pem)
            except trio.TooSlowError:
                log.warning("a certificate was not approved in time; requesting another one")
            except (ApiError, Refusal, OSError, ValueError) as error:
                ended = api is self._first and isinstance(error, Refused) and error.http == 401
                log.warning("no certificate yet: %s%s", error, _about_token(api.clock_ahead) if ended else "")
                await trio.sleep(RETRY_SECONDS)
                kept = self.load()
                if kept is None or self._left(kept) <= 0:
                    continue
                log.info(
                    "the certificate is valid after all: the clock was set", extra={"signer": self._identity.signer}
                )
                pair = kept
            else:
                log.info("new certificate", extra={"signer": self._identity.signer})
            self._use(pair)
            return pair

    def _say_waiting(self, name: str) -> None:
        hint = (
            f"; approve it with `kubectl certificate approve {name}`" if self._identity.signer == SERVING_SIGNER else ""
        )
        log.info("requested a certificate from the cluster: %s%s", name, hint)


def _about_token(clock_ahead: float) -> str:
    """Of a bootstrap token that the cluster does not take; when it ends was decided by this host's clock."""
    if clock_ahead < -MAX_SKEW:
        told = f"the bootstrap token has ended, and {difference(clock_ahead)}, which is to be set first"
    else:
        told = "the bootstrap token has ended, or it was not applied"
    return f"; {told}; `hypeman node join` writes a new one"


def load(path: Path, now: datetime) -> Pair | None:
    """None if there is none, or if it has ended or cannot be read."""
    try:
        pair = Pair.parse(path.read_bytes())
    except (OSError, ValueError):
        return None
    return pair if pair.certificate.not_valid_after_utc > now else None


def store(path: Path, pem: bytes) -> None:
    """Replace the file; readable for us alone."""
    side = path.with_suffix(".new")
    descriptor = os.open(side, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    side.rename(path)


def _together(certificates: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    return certificates + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
