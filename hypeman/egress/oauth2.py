"""Access tokens by OAuth 2.0, obtained by the server for a guest that never sees what they are obtained with.

    client_credentials   RFC 6749 §4.4; the value is the client's secret
    refresh_token        RFC 6749 §6; the value is the refresh token, or JSON with refresh_token and client_secret
    jwt_bearer           RFC 7523; the value is the private key (PEM), RS256 or ES256
    github_app           an installation token of a GitHub App; the value is the app's private key (PEM)
    google               a Google service account; the value is its key file (JSON)

Requests go over TLS, to public addresses only (and those that the configuration allows), checked when they are
connected to; redirects are failures. Messages contain no part of a value, and of an answer only the error code of
RFC 6749.
"""

from __future__ import annotations

import base64
import re
import ssl
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import httpcore
import msgspec
import trio

from hypeman import __version__
from hypeman.egress.transforms import Unavailable, Value, valid_until
from hypeman.egress.types import OAuth2Form
from hypeman.errors import InvalidRequest, cause_of
from hypeman.host.checked_backend import CheckedBackend

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

TIMEOUT = 20.0
"""Seconds for one request."""
MAX_ANSWER = 64 << 10
_ASSERTION_LIFE = 300
"""Seconds for which an assertion is valid; GitHub takes at most 600."""
_USUAL_LIFE = 3600.0
"""Seconds for which a token counts as valid if its answer does not say; RFC 6749 only recommends to."""
_ODD_LIFE = 60.0
"""Seconds for which a token counts as valid that, by its answer, expired before it came, or at no possible time."""
_JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_GOOGLE = "https://oauth2.googleapis.com/token"
_GITHUB = "https://api.github.com"
_ERROR = re.compile(r"[a-z_]{1,40}")


class Token(NamedTuple):
    value: Value
    secret: str | None = None
    """What the next one is obtained with, if the answer brought another refresh token."""

    def __repr__(self) -> str:
        return f"Token({self.value})"


class _Answer(msgspec.Struct, frozen=True):
    access_token: str = ""
    token: str = ""
    """GitHub's name for it."""
    expires_in: float | str | None = None
    expires_at: datetime | None = None
    refresh_token: str | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: str = ""


class _ServiceAccount(msgspec.Struct, frozen=True):
    """The parts that we use of a key file of Google's."""

    client_email: str
    private_key: str
    private_key_id: str = ""

    def __repr__(self) -> str:
        return f"_ServiceAccount({self.client_email})"


class _Refresh(msgspec.Struct, frozen=True):
    refresh_token: str
    client_secret: str = ""

    def __repr__(self) -> str:
        return "_Refresh(…)"


def token_url(form: OAuth2Form) -> str:
    """Where the request goes. Raises InvalidRequest if the form is incomplete, or that is no address."""
    url = _token_url(form)
    try:
        good = url.isascii() and url.isprintable() and bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:
        good = False
    if not good:
        raise InvalidRequest("token_url of oauth2 must be in ASCII, with a port that there is")
    return url


def _token_url(form: OAuth2Form) -> str:
    if form.grant == "github_app":
        if not form.client_id or not form.installation_id:
            raise InvalidRequest("oauth2 with grant github_app needs client_id and installation_id")
        base = (form.token_url or _GITHUB).rstrip("/")
        return f"{base}/app/installations/{quote(form.installation_id, safe='')}/access_tokens"
    if form.grant == "google":
        if not form.scope:
            raise InvalidRequest("oauth2 with grant google needs scope")
        return form.token_url or _GOOGLE
    if form.token_url is None:
        raise InvalidRequest(f"oauth2 with grant {form.grant} needs token_url")
    if form.grant == "jwt_bearer" and not form.issuer:
        raise InvalidRequest("oauth2 with grant jwt_bearer needs issuer")
    if form.grant == "client_credentials" and not form.client_id:
        raise InvalidRequest("oauth2 with grant client_credentials needs client_id")
    return form.token_url


def check_secret(form: OAuth2Form, secret: str) -> None:
    """Raise InvalidRequest, never containing it, unless tokens can be requested with ``secret``."""
    request_of(form, secret, now=0.0)


class Request(NamedTuple):
    url: str
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"Request({self.url})"


def request_of(form: OAuth2Form, secret: str, *, now: float) -> Request:
    """The request for a token. Raises InvalidRequest."""
    url = token_url(form)
    if form.grant == "github_app":
        key = _load_key(secret, "RS256")
        claims = {"iss": form.client_id, "iat": int(now) - 60, "exp": int(now) + _ASSERTION_LIFE}
        headers = {
            "authorization": f"Bearer {_jwt(key, 'RS256', claims)}",
            "accept": "application/vnd.github+json",
            "x-github-api-version": "2022-11-28",
        }
        return Request(url, headers, b"")
    fields: dict[str, str] = {}
    headers = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
    if form.grant == "google":
        account = _decode(secret, _ServiceAccount, "the key file of a Google service account (JSON)")
        claims = {"iss": account.client_email, "scope": form.scope, "aud": url}
        if form.subject:
            claims["sub"] = form.subject
        key = _load_key(account.private_key, "RS256")
        fields = {"grant_type": _JWT_BEARER, "assertion": _assertion(key, "RS256", claims, account.private_key_id, now)}
    elif form.grant == "jwt_bearer":
        claims = {"iss": form.issuer, "sub": form.subject or form.issuer, "aud": form.audience or url}
        key = _load_key(secret, form.algorithm)
        fields = {"grant_type": _JWT_BEARER, "assertion": _assertion(key, form.algorithm, claims, form.key_id, now)}
    else:
        fields = _client_fields(form, secret, headers)
    if form.grant != "google" and form.scope:
        fields["scope"] = form.scope
    if form.grant == "client_credentials" and form.audience:
        fields["audience"] = form.audience
    return Request(url, headers, urlencode(fields).encode())


def _client_fields(form: OAuth2Form, secret: str, headers: dict[str, str]) -> dict[str, str]:
    """Of client_credentials and refresh_token, with the client's authentication."""
    client_secret = secret
    fields: dict[str, str] = {"grant_type": form.grant}
    if form.grant == "refresh_token":
        given = _read_refresh(secret)
        fields["refresh_token"], client_secret = given.refresh_token, given.client_secret
    if not client_secret and form.grant == "client_credentials":
        raise InvalidRequest("the value for oauth2 must not be empty")
    if client_secret and form.client_auth == "basic":
        pair = f"{quote(form.client_id, safe='')}:{quote(client_secret, safe='')}"  # RFC 6749 2.3.1
        headers["authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    elif form.client_id:
        fields["client_id"] = form.client_id
        if client_secret:
            fields["client_secret"] = client_secret
    return fields


def _read_refresh(secret: str) -> _Refresh:
    if secret.lstrip().startswith("{"):
        given: _Refresh = _decode(secret, _Refresh, "a refresh token, or JSON with refresh_token and client_secret")
        return given
    if not secret:
        raise InvalidRequest("the value for oauth2 must not be empty")
    return _Refresh(secret)


def _decode(text: str, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError):
        raise InvalidRequest(f"the value for oauth2 must be {what}") from None


# ── Assertions (RFC 7515, 7519) ──────────────────────────────────────────────────────────────────


def _load_key(pem: str, algorithm: str) -> PrivateKeyTypes:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem.encode(), None)
    except Exception:  # of a dozen kinds; all mean the same, and none is to be shown
        raise InvalidRequest("the value for oauth2 must be an unencrypted private key in PEM") from None
    fits = (
        isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048
        if algorithm == "RS256"
        else isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
    )
    if not fits:
        wanted = "an RSA key of at least 2048 bits" if algorithm == "RS256" else "a P-256 key"
        raise InvalidRequest(f"the private key for oauth2 with {algorithm} must be {wanted}")
    return key


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _assertion(key: PrivateKeyTypes, algorithm: str, claims: Mapping[str, object], key_id: str, now: float) -> str:
    times = {"iat": int(now), "exp": int(now) + _ASSERTION_LIFE, "jti": token_hex(16)}
    return _jwt(key, algorithm, {**claims, **times}, key_id)


def _jwt(key: Any, algorithm: str, claims: Mapping[str, object], key_id: str = "") -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, padding
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
    from cryptography.hazmat.primitives.hashes import SHA256

    head = {"alg": algorithm, "typ": "JWT", **({"kid": key_id} if key_id else {})}
    text = ".".join(_base64url(msgspec.json.encode(part)) for part in (head, claims))
    if algorithm == "RS256":
        signature = key.sign(text.encode(), padding.PKCS1v15(), SHA256())
    else:
        r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(SHA256())))
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return f"{text}.{_base64url(signature)}"


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────


class TokenClient:
    """Requests tokens."""

    def __init__(self, tls: Callable[[], ssl.SSLContext], may_connect: Callable[[str], bool]) -> None:
        """``may_connect``: whether a server of tokens may have this address."""
        self._tls = tls
        self._backend = CheckedBackend(may_connect)

    async def obtain(self, form: OAuth2Form, secret: str) -> Token:
        """Raises Unavailable, or InvalidRequest if ``secret`` cannot be used."""
        request = request_of(form, secret, now=time.time())
        where = request.url.partition("?")[0]
        try:
            with trio.fail_after(TIMEOUT):
                status, said = await self._post(request)
        except trio.TooSlowError:
            raise Unavailable(f"no token from {where}: no answer within {TIMEOUT:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise Unavailable(f"no token from {where}: {cause_of(error)}") from None
        if not 200 <= status < 300:
            raise Unavailable(f"no token from {where}: status {status}{_error_code(said)}")
        return _read_answer(form, secret, said, where)

    async def _post(self, request: Request) -> tuple[int, bytes]:
        headers: list[tuple[bytes | str, bytes | str]] = [*request.headers.items()]
        headers.append(("user-agent", f"Hypeman/{__version__}"))
        headers.append(("content-length", str(len(request.body))))
        said = bytearray()
        async with (
            httpcore.AsyncConnectionPool(self._tls(), max_connections=1, network_backend=self._backend) as pool,
            pool.stream("POST", request.url, headers=headers, content=request.body) as response,
        ):
            async for part in response.aiter_stream():  # to its end: httpcore cannot be left in the middle
                if len(said) <= MAX_ANSWER:
                    said += part
            if len(said) > MAX_ANSWER:
                raise httpcore.RemoteProtocolError(f"a response of more than {MAX_ANSWER} bytes")
            return response.status, bytes(said)


def _error_code(said: bytes) -> str:
    try:
        code = msgspec.json.decode(said, type=_Refusal).error
    except (msgspec.MsgspecError, UnicodeError):
        return ""
    return f" {code}" if _ERROR.fullmatch(code) else ""


def _end_of(moment: datetime | None, lasts: float) -> float:
    """When a token is to be replaced at the latest. The answer may have brought another refresh token, so that a time
    that cannot be meant is no reason to refuse it."""
    try:
        return valid_until(moment.timestamp() if moment is not None else time.time() + lasts)
    except (ValueError, OverflowError):
        return time.time() + _ODD_LIFE


def _read_answer(form: OAuth2Form, secret: str, said: bytes, where: str) -> Token:
    try:
        answer = msgspec.json.decode(said, type=_Answer)
        lasts = float(answer.expires_in) if answer.expires_in is not None else _USUAL_LIFE
    except (msgspec.MsgspecError, UnicodeError, ValueError):
        raise Unavailable(f"no token from {where}: the response cannot be parsed") from None
    text = answer.access_token or answer.token
    if not text:
        raise Unavailable(f"no token from {where}: the response has no token")
    value = Value(text, _end_of(answer.expires_at, lasts))
    if form.grant != "refresh_token" or not answer.refresh_token:
        return Token(value)
    before = _read_refresh(secret)
    if answer.refresh_token == before.refresh_token:
        return Token(value)
    if before.client_secret:
        rotated = _Refresh(answer.refresh_token, before.client_secret)
        return Token(value, msgspec.json.encode(rotated).decode())
    return Token(value, answer.refresh_token)
