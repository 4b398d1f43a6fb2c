"""What a credential becomes in a request (``inject[].as``), checked and compiled for the data plane. Pure.

A form is compiled to numbers and texts that `ext/egress/transform.c` applies. What does not depend on the request
(fields with a fixed value, the escaped value of a parameter) is computed here, the rest there.

No error, repr or log line contains a value.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import hmac
import html
import re
import struct
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, quote_plus

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from hypeman.egress.types import BasicForm, InjectAs
from hypeman.errors import HypemanError, InvalidRequest

MAX_VALUE = 8 * 1024
MIN_SCRUBBED = 8
"""Characters; shorter texts would be replaced where they mean nothing."""
_TEXTS_OF_A_RULE = 6
MAX_CHAIN = 6
"""Certificates, the client's own included."""
_YEAR_10000 = 253402300800.0

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_VISIBLE = re.compile(r"[\x20-\x7e]*")
_EXPRESSION = re.compile(r"\$\{([^}]*)\}")
_KEY_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_SECRET = re.compile(r"[\x21-\x7e]{1,256}")
_BASE64 = re.compile(r"base64\(([^():]*):([^():]*)\)")

FIXED_HEADERS = frozenset(
    (
        "connection", "content-encoding", "content-length", "content-type", "expect", "host", "http2-settings",
        "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "via",
    )
)  # fmt: skip
"""Message framing and hop-by-hop headers; a rule cannot set them."""


class Value(msgspec.Struct, frozen=True):
    """A real value that the server obtained."""

    text: str
    expires_at: float = 0.0
    """Unix time; 0: it does not expire."""

    def __repr__(self) -> str:
        return f"Value(expires_at={self.expires_at})"


def valid_until(moment: float) -> float:
    """The time at which a value expires, as others say. Raises ValueError if it is over, or no time."""
    if not time.time() < moment < _YEAR_10000:
        raise ValueError("the value has expired, or the time at which it expires is none")
    return moment


class Unavailable(HypemanError):
    """A value could not be obtained; the message contains none."""


class Kind(enum.IntEnum):
    """As in ext/egress/policy.h."""

    HEADER = 0
    QUERY = 1
    SIGV4 = 2
    HMAC = 3
    BODY = 4
    MTLS = 5
    SCRUB = 6
    POSTGRES = 7
    MYSQL = 8


class Compiled(NamedTuple):
    """A rule as the data plane takes it, without the hosts."""

    kind: Kind
    name: str
    value: str
    extra: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Compiled({self.kind.name}, {self.name})"

    def encode(self, *, ready: bool, expires_at: float) -> bytes:
        head = struct.pack("<BBQ", self.kind, ready, int(expires_at))
        texts = (encode_text(text) for text in self.extra)
        return head + encode_text(self.name) + encode_text(self.value) + bytes([len(self.extra)]) + b"".join(texts)


def encode_text(value: str) -> bytes:
    data = value.encode("ascii")
    return struct.pack("<H", len(data)) + data


class Form(NamedTuple):
    """One way to use a credential."""

    kind: Kind
    name: str
    """Of the header, in lower case, or the parameter."""
    target: str
    """What it sets: two rules with one host and one target clash."""
    shown: str
    """The target, in an error."""
    render: Callable[[str], Compiled]
    """From the real value. Raises InvalidRequest, never containing it."""
    extra: tuple[str, ...] = ()
    """Of the rule while it has no value."""
    scope: str = ""
    """Which requests of a host: two rules for different ones do not clash."""
    secrets: Callable[[str], tuple[str, ...]] = lambda value: (value,)
    """What of the real value a host gets to know."""

    def compile(self, value: Value | None) -> bytes:
        """With the value, or as a rule that has none yet."""
        if value is None:
            return Compiled(self.kind, self.name, "", self.extra).encode(ready=False, expires_at=0)
        return self.render(value.text).encode(ready=True, expires_at=value.expires_at)

    def compile_scrubbing(self, value: Value | None) -> list[bytes]:
        """Rules with what to look for in responses. Raises InvalidRequest."""
        texts = () if value is None else self._shown(value.text)
        return [
            Compiled(Kind.SCRUB, "scrub", "", texts[at : at + _TEXTS_OF_A_RULE]).encode(ready=True, expires_at=0)
            for at in range(0, max(1, len(texts)), _TEXTS_OF_A_RULE)
        ]

    def _shown(self, value: str) -> tuple[str, ...]:
        """How a host could show the value again."""
        compiled = self.render(value)
        secrets = [secret for secret in self.secrets(value) if secret]
        if min(map(len, secrets), default=0) < MIN_SCRUBBED:
            raise InvalidRequest(f"a value that is scrubbed must have at least {MIN_SCRUBBED} characters")
        texts = [text for secret in secrets for text in spellings(secret)]
        if compiled.kind is Kind.HEADER:  # of a Basic credential the value is not a part
            texts += spellings(compiled.value.split(" ")[-1]) if secrets[0] not in compiled.value else []
        return tuple(dict.fromkeys(texts))


def spellings(secret: str) -> list[str]:
    """A text as it is, and as JSON, HTML, a URL, a form and base64 have it."""
    escaped = quote(secret, safe="")
    as_json = msgspec.json.encode(secret)[1:-1].decode()
    return [
        secret,
        as_json,
        as_json.replace("/", "\\/"),  # PHP
        re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", as_json),  # Go
        html.escape(secret),
        escaped,
        re.sub("%..", lambda match: match[0].lower(), escaped),
        quote(secret),
        quote_plus(secret),
        base64.b64encode(secret.encode()).decode().rstrip("="),
    ]


def form_of(shape: InjectAs, placeholder: str) -> Form:
    """``placeholder``: what the guest has instead of the value. Raises InvalidRequest unless one form is given."""
    given = [name for name in (*_FORMS, "postgres") if getattr(shape, name) is not None]
    if shape.format is not None and shape.header is None:
        raise InvalidRequest("inject.as.format needs inject.as.header")
    if len(given) != 1:
        raise InvalidRequest(f"inject.as must have header with format, or exactly one of {', '.join(_OTHERS)}")
    if shape.postgres is not None:
        return _postgres(shape, placeholder)
    return _FORMS[given[0]](shape)


# ── Fields ───────────────────────────────────────────────────────────────────────────────────────


def parse_header(name: str) -> str:
    """The header's name in lower case, if a rule may set it."""
    lowered = name.lower()
    if not _TOKEN.fullmatch(name):
        raise InvalidRequest(f"header {name!r} is not a header name")
    if lowered in FIXED_HEADERS:
        raise InvalidRequest(f"header {name!r} controls how the message is transferred and cannot be set")
    return lowered


def check_value(secret: str) -> str:
    """``secret``, if it can be part of a head. Raises InvalidRequest."""
    if not secret or not _VISIBLE.fullmatch(secret):
        raise InvalidRequest("the real value of a credential must be visible ASCII characters, at least one")
    return secret


def render_value(template: str, secret: str) -> str:
    """The header's value: ``${value}`` is the secret, ``${base64(user:value)}`` a Basic credential with it.

    Raises InvalidRequest, never containing the secret, if the template or the resulting header value is invalid.
    """
    used = False

    def pair(text: str) -> str:
        nonlocal used
        used = used or text == "value"
        return secret if text == "value" else text

    def replace(match: re.Match[str]) -> str:
        nonlocal used
        if match[1] == "value":
            used = True
            return secret
        basic = _BASE64.fullmatch(match[1])
        if basic is None:
            raise InvalidRequest(f"format {template!r} may contain ${{value}} and ${{base64(user:value)}} only")
        return base64.b64encode(f"{pair(basic[1])}:{pair(basic[2])}".encode()).decode()

    value = _EXPRESSION.sub(replace, template)
    if not used:
        raise InvalidRequest(f"format {template!r} must contain ${{value}}")
    check_value(secret)
    if not _VISIBLE.fullmatch(value) or value != value.strip() or len(value) > MAX_VALUE:
        raise InvalidRequest(f"format {template!r} does not make a header value of visible ASCII, at most 8 KB")
    return value


def _field(header: str, render: Callable[[str], str]) -> Form:
    name = parse_header(header)
    variable = name.replace("_", "-")  # one variable to CGI and its like
    return Form(
        Kind.HEADER,
        name,
        f"header {variable}",
        f"header {name!r}",
        lambda value: Compiled(Kind.HEADER, name, render(value)),
    )


def _header(shape: InjectAs) -> Form:
    template = shape.format
    if template is None:
        raise InvalidRequest("inject.as.header needs inject.as.format")
    assert shape.header is not None
    render_value(template, "x")  # so that a template is refused even before there is a value
    return _field(shape.header, lambda value: render_value(template, value))


def _basic(shape: InjectAs) -> Form:
    assert shape.basic is not None
    return _field("Authorization", lambda value: _basic_value(shape.basic, value))


def _basic_value(form: BasicForm | None, value: str) -> str:
    assert form is not None
    if ":" in form.username or not _VISIBLE.fullmatch(form.username):
        raise InvalidRequest("basic.username must be visible ASCII without a colon")
    pair = f"{form.username}:{check_value(value)}"
    if len(pair) > MAX_VALUE // 2:
        raise InvalidRequest("a Basic credential has at most 4 KB")
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _oauth2(shape: InjectAs) -> Form:
    """The value is the access token; oauth2.py obtains it."""
    form = shape.oauth2
    assert form is not None
    template = form.format
    render_value(template, "x")
    return _field(form.header, lambda value: render_value(template, value))


# ── The query ────────────────────────────────────────────────────────────────────────────────────


def _query(shape: InjectAs) -> Form:
    assert shape.query is not None
    if not _VISIBLE.fullmatch(shape.query):
        raise InvalidRequest("query must name a parameter in visible ASCII")
    name = quote(shape.query, safe="")

    def render(value: str) -> Compiled:
        escaped = quote(check_value(value), safe="")
        if len(escaped) > MAX_VALUE:
            raise InvalidRequest("the value of a query parameter has at most 8 KB")
        return Compiled(Kind.QUERY, name, escaped)

    return Form(Kind.QUERY, name, f"query {name}", f"query parameter {shape.query!r}", render)


# ── Signatures ───────────────────────────────────────────────────────────────────────────────────


_SIGNATURES = {"github": "x-hub-signature-256", "stripe": "stripe-signature", "slack": "x-slack-signature"}


def _hmac(shape: InjectAs) -> Form:
    assert shape.hmac is not None
    scheme = shape.hmac.scheme
    name = _SIGNATURES[scheme]

    def render(value: str) -> Compiled:
        if len(check_value(value)) > MAX_VALUE:
            raise InvalidRequest("the key for hmac has at most 8 KB")
        return Compiled(Kind.HMAC, name, value, (scheme,))

    return Form(Kind.HMAC, name, f"header {name}", f"header {name!r}", render, extra=(scheme,))


def _body(shape: InjectAs) -> Form:
    def render(value: str) -> Compiled:
        if len(check_value(value)) > MAX_VALUE:
            raise InvalidRequest("the value for body has at most 8 KB")
        as_json = msgspec.json.encode(value)[1:-1].decode()
        return Compiled(Kind.BODY, "body", "", (as_json, quote(value, safe="")))

    return Form(Kind.BODY, "body", "body", "the placeholder in bodies", render, extra=("", ""))


# ── Client certificates ──────────────────────────────────────────────────────────────────────────


_PEM_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)


def _mtls(shape: InjectAs) -> Form:
    return Form(
        Kind.MTLS, "certificate", "client certificate", "the client certificate", _identity, secrets=lambda value: ()
    )


def _identity(value: str) -> Compiled:
    """Raises InvalidRequest, never containing the value."""
    blocks = [(match[1], match[0].encode("ascii", "replace")) for match in _PEM_BLOCK.finditer(value)]
    chain = [pem for kind, pem in blocks if kind == "CERTIFICATE"]
    keys = [pem for kind, pem in blocks if kind.endswith("PRIVATE KEY")]
    if not 0 < len(chain) <= MAX_CHAIN or len(keys) != 1:
        raise InvalidRequest(
            f"the value for mtls must be a certificate with at most {MAX_CHAIN - 1} intermediates behind it and its "
            "unencrypted private key, in PEM"
        )
    try:
        certificates = [load_pem_x509_certificate(pem) for pem in chain]
        key = load_pem_private_key(keys[0], password=None)
        matches = key.public_key() == certificates[0].public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("the certificate or private key for mtls cannot be read") from None
    if not matches:
        raise InvalidRequest("the private key for mtls does not belong to the first certificate")
    texts = [
        base64.b64encode(der).decode()
        for der in (
            key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            *(certificate.public_bytes(Encoding.DER) for certificate in certificates),
        )
    ]
    if max(map(len, texts)) > 2 * MAX_VALUE:
        raise InvalidRequest("a certificate or key for mtls has at most 16 KB")
    return Compiled(Kind.MTLS, "certificate", texts[0], tuple(texts[1:]))


# ── Postgres ─────────────────────────────────────────────────────────────────────────────────────


_ITERATIONS = 4096
"""Of the placeholder's verifier, as in ext/egress/scram.c; it keeps no secret."""
MAX_PASSWORD = 1000


@lru_cache(maxsize=1024)
def placeholder_verifier(text: str) -> str:
    """With what the data plane checks by SCRAM-SHA-256 that a client knows ``text`` (RFC 5802): salt, StoredKey and
    ServerKey in base64. Equal for equal texts, since equal policies are to change nothing."""
    salt = hashlib.sha256(f"hypeman {text}".encode()).digest()[:16]
    salted = hashlib.pbkdf2_hmac("sha256", text.encode(), salt, _ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    return base64.b64encode(salt + stored + hmac.digest(salted, b"Server Key", "sha256")).decode()


def _postgres(shape: InjectAs, placeholder: str) -> Form:
    form = shape.postgres
    assert form is not None
    if form.tls == "off" and form.auth == "password":
        raise InvalidRequest("postgres: with tls off the password itself is never sent; choose auth scram or md5")
    plain = "plain" if form.tls == "off" else ""
    extra = (form.user, form.database or "", placeholder_verifier(placeholder), form.auth, plain)

    def render(value: str) -> Compiled:
        if len(check_value(value)) > MAX_PASSWORD:
            raise InvalidRequest(f"a password for postgres has at most {MAX_PASSWORD} characters")
        return Compiled(Kind.POSTGRES, "postgres", value, extra)

    return Form(
        Kind.POSTGRES, "postgres", f"postgres {form.user}", f"the password of {form.user!r}", render, extra=extra
    )


# ── MySQL ────────────────────────────────────────────────────────────────────────────────────────


def _mysql(shape: InjectAs) -> Form:
    form = shape.mysql
    assert form is not None
    if form.tls == "off" and form.auth == "clear":
        raise InvalidRequest("mysql: with tls off the password itself is never sent; choose auth sha2 or native")
    extra = (form.user, "", "", form.auth, "plain" if form.tls == "off" else "")
    most = MAX_VALUE if form.auth == "clear" else MAX_PASSWORD  # which may be a token

    def render(value: str) -> Compiled:
        if len(check_value(value)) > most:
            raise InvalidRequest(f"a password for mysql has at most {most} characters")
        return Compiled(Kind.MYSQL, "mysql", value, extra)

    return Form(Kind.MYSQL, "mysql", f"mysql {form.user}", f"the password of {form.user!r}", render, extra=extra)


class _AwsKeys(msgspec.Struct, frozen=True):
    """Output of a ``credential_process`` of the AWS CLI."""

    key_id: str = msgspec.field(name="AccessKeyId")
    secret: str = msgspec.field(name="SecretAccessKey")
    token: str | None = msgspec.field(default=None, name="SessionToken")

    def __repr__(self) -> str:
        return f"_AwsKeys({self.key_id})"


def _sigv4(shape: InjectAs) -> Form:
    form = shape.sigv4
    assert form is not None
    scope = (form.region, form.service)

    def render(value: str) -> Compiled:
        keys = _aws_keys(value)
        return Compiled(Kind.SIGV4, "authorization", keys.secret, (keys.key_id, keys.token or "", *scope))

    return Form(
        Kind.SIGV4,
        "authorization",
        "header authorization",
        f"signatures for {form.service} in {form.region}",
        render,
        extra=("", "", *scope),
        scope="/".join(scope),
        secrets=_aws_secrets,
    )


def _aws_secrets(value: str) -> tuple[str, ...]:
    keys = _aws_keys(value)
    return keys.secret, keys.token or ""


def _aws_keys(value: str) -> _AwsKeys:
    """Raises InvalidRequest, never containing the value."""
    try:
        if value.lstrip().startswith("{"):
            keys = msgspec.json.decode(value, type=_AwsKeys)
        else:
            keys = _AwsKeys(*value.split(":"))
    except (msgspec.MsgspecError, TypeError):
        raise InvalidRequest(
            "the value for sigv4 must be ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN] or JSON as of a "
            "credential_process"
        ) from None
    good = _KEY_ID.fullmatch(keys.key_id) and _SECRET.fullmatch(keys.secret)
    if not good or not re.fullmatch(r"[\x21-\x7e]{0,4096}", keys.token or ""):
        raise InvalidRequest("the access key, secret key or session token for sigv4 has invalid characters")
    return keys


_FORMS: Mapping[str, Callable[[InjectAs], Form]] = {
    "header": _header,
    "basic": _basic,
    "query": _query,
    "sigv4": _sigv4,
    "oauth2": _oauth2,
    "hmac": _hmac,
    "body": _body,
    "mtls": _mtls,
    "mysql": _mysql,
}
_OTHERS = (*(name for name in _FORMS if name != "header"), "postgres")
