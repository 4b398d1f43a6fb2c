"""One CA, spoken to in ACME (RFC 8555) with the library of the Certbot project. Blocking: call it in threads.

Everything that the CA sends is bounded and decoded strictly; every failure is an ``AcmeError``. The library's own
procedures wait and order without a way to continue after a crash, so only its signed requests are used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
import requests
import urllib3
from acme import challenges, errors, messages
from acme.client import ClientNetwork, ClientV2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy import b64, jwa, jwk

from hypeman import __version__
from hypeman.host.tls import CA_FILES
from hypeman.ingress.certificates.acme_types import AcmeError, AuthorizationView, CASettings, OrderView
from hypeman.ingress.certificates.pem import key_pem

T = TypeVar("T")

_MAX_BODY = 1 << 20
_EACH_WAIT = 15
"""Seconds for a connection, and for each piece of an answer."""
_WHOLE_ANSWER = 45.0
_NONCE_ATTEMPTS = 8
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")

for _name in ("acme", "urllib3", "josepy"):
    logging.getLogger(_name).setLevel(logging.INFO)  # what they log below that has whole requests in it


class BoundedSession(requests.Session):
    """Bounds what an answer may take: bytes and time. Follows no redirects."""

    def request(self, method: Any, url: Any, *args: Any, **kwargs: Any) -> requests.Response:
        if not str(url).startswith("https://"):
            raise errors.ClientError(f"the CA returned a URL that is not https: {str(url)[:100]}")
        kwargs["allow_redirects"] = False
        return super().request(method, url, *args, **kwargs)

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        deadline = time.monotonic() + _WHOLE_ANSWER
        kwargs["stream"] = True
        response = super().send(request, **kwargs)
        body = bytearray()
        try:
            while piece := response.raw.read1(1 << 16, decode_content=True):
                body += piece
                if len(body) > _MAX_BODY:
                    raise errors.ClientError("a response from the CA is too long")
                if time.monotonic() > deadline:
                    raise errors.ClientError("a response from the CA takes too long")
        finally:
            response.close()
        response._content = bytes(body)
        return response


class _Network(ClientNetwork):
    """Repeats a request whose nonce is refused more often than the library does: a CA may refuse several in a row."""

    def post(self, *args: Any, **kwargs: Any) -> requests.Response:
        for left in reversed(range(_NONCE_ATTEMPTS)):
            try:
                return super().post(*args, **kwargs)
            except messages.Error as error:
                if error.code != "badNonce" or not left:
                    raise
        raise AssertionError


class CA:
    """A connection to the CA, for one thread at a time. Methods raise AcmeError."""

    def __init__(self, settings: CASettings, account_key: str, account_url: str = "") -> None:
        self._settings = settings
        private = serialization.load_pem_private_key(account_key.encode(), password=None)
        self._key = jwk.JWKEC(key=private)
        verify: Any = settings.ca_file or next((path for path in CA_FILES if os.path.exists(path)), True)
        self._net = _Network(
            self._key, alg=jwa.ES256, verify_ssl=verify, user_agent=f"hypeman/{__version__}", timeout=_EACH_WAIT
        )
        self._net.session.close()
        self._net.session = BoundedSession()
        if account_url:
            self._net.account = messages.RegistrationResource(uri=account_url, body=messages.Registration())
        self._client: ClientV2 | None = None

    def close(self) -> None:
        self._net.session.close()

    def register(self) -> str:
        """The URL of the key's account, which is made if there is none; accepts the CA's terms."""

        def run() -> str:
            client = self._open()
            binding = None
            if self._settings.eab_key_id:
                binding = messages.ExternalAccountBinding.from_data(
                    account_public_key=self._key.public_key(),
                    kid=self._settings.eab_key_id,
                    hmac_key=self._settings.eab_hmac_key,
                    directory=client.directory,
                )
            elif client.external_account_required():
                raise AcmeError("the CA requires an external account: set acme.eab_key_id and acme.eab_hmac_key")
            wanted = messages.NewRegistration.from_data(
                email=self._settings.email or None, terms_of_service_agreed=True, external_account_binding=binding
            )
            self._net.account = None
            try:
                return str(client.new_account(wanted).uri)
            except errors.ConflictError as error:
                return str(error.location)

        url = self._try(run)
        self._net.account = messages.RegistrationResource(uri=url, body=messages.Registration())
        return url

    def new_order(self, name: str) -> tuple[str, OrderView]:
        """Its URL, and the order."""

        def run() -> tuple[str, OrderView]:
            identifier = messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=name)
            response = self._post(
                self._open().directory["newOrder"],
                messages.NewOrder(identifiers=[identifier], profile=self._settings.profile),
            )
            return response.headers["Location"], _decode(response, OrderView)

        return self._try(run)

    def order(self, url: str) -> OrderView:
        return self._try(lambda: _decode(self._post(url, None), OrderView))

    def authorization(self, url: str) -> AuthorizationView:
        return self._try(lambda: _decode(self._post(url, None), AuthorizationView))

    def key_authorization(self, token: str) -> str:
        """The answer to a challenge."""
        if not _TOKEN.fullmatch(token):
            raise AcmeError("the CA sent an invalid token", is_final=True)
        return f"{token}.{b64.b64encode(self._key.thumbprint()).decode()}"

    def answer(self, url: str) -> None:
        """Have the CA look."""
        self._try(lambda: self._post(url, challenges.HTTP01Response(key_authorization="")))

    def finalize(self, url: str, name: str, key: str) -> OrderView:
        def run() -> OrderView:
            private = serialization.load_pem_private_key(key.encode(), password=None)
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            request = (
                x509.CertificateSigningRequestBuilder()
                .subject_name(x509.Name([]))
                .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
                .sign(private, hashes.SHA256())
            )
            return _decode(self._post(url, messages.CertificateRequest(csr=request)), OrderView)

        return self._try(run)

    def download(self, url: str) -> str:
        """The chain, PEM."""
        return self._try(lambda: self._post(url, None).text)

    def renewal_time(self, chain: str) -> datetime | None:
        """When the CA suggests to replace the certificate (RFC 9773); None if it does not say."""

        def run() -> datetime | None:
            found, _ = self._open().renewal_time(chain.encode())
            return found if found is None or found.tzinfo is not None else found.replace(tzinfo=UTC)

        return self._try(run)

    def revoke(self, chain: str) -> None:
        """Revoke a certificate of the account."""
        certificate = x509.load_pem_x509_certificate(chain.encode())
        self._try(lambda: self._open().revoke(certificate, 0))

    def _open(self) -> ClientV2:
        if self._client is None:
            self._client = ClientV2(ClientV2.get_directory(self._settings.directory, self._net), self._net)
        return self._client

    def _post(self, url: str, body: Any) -> requests.Response:
        return self._net.post(url, body, new_nonce_url=self._open().directory["newNonce"])

    def _try(self, run: Callable[[], T]) -> T:
        try:
            return run()
        except AcmeError:
            raise
        except messages.Error as error:
            code = error.code or ""
            text = error.detail or error.title or "no reason given"
            is_final = code in ("malformed", "unauthorized", "orderDoesNotExist", "rejectedIdentifier", "badCSR", "caa")
            raise AcmeError(f"{code or error.typ}: {text}", code, is_final=is_final) from None
        except errors.ClientError as error:
            raise AcmeError(_client_error(error)) from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise AcmeError(f"the CA cannot be reached: {error}") from None
        except Exception as error:  # the library raises many kinds for what a CA should not send
            raise AcmeError(f"the CA's response cannot be parsed: {type(error).__name__}: {error}") from None


def _client_error(error: errors.ClientError) -> str:
    first = error.args[0] if error.args else ""
    first = first[0] if isinstance(first, tuple) else first
    if isinstance(first, requests.Response):
        return f"the CA responded with {first.status_code} without a reason"
    return f"the CA's response cannot be parsed: {first}"


def _decode(response: requests.Response, kind: type[T]) -> T:
    return msgspec.json.decode(response.content, type=kind)


def make_key() -> str:
    """A new key, PEM."""
    return key_pem(ec.generate_private_key(ec.SECP256R1()))


def tls_alpn_certificate(name: str, authorization: str, now: datetime) -> tuple[str, str]:
    """Chain and key that answer TLS-ALPN-01 (RFC 8737)."""
    key = ec.generate_private_key(ec.SECP256R1())
    digest = hashlib.sha256(authorization.encode()).digest()
    subject = x509.Name([])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .add_extension(x509.UnrecognizedExtension(_ACME_IDENTIFIER, b"\x04\x20" + digest), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), key_pem(key)
