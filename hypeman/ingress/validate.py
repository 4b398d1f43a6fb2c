"""Checks requests for ingresses. Pure but for the look-up of instances, which is passed in."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from hypeman.errors import Conflict, InvalidRequest, NotFound
from hypeman.ids import check_name, check_tags, new_id
from hypeman.ingress.hostnames import captures, parse_hostname, references, shape
from hypeman.ingress.types import CreateIngressRequest, IngressRecord, IngressRule, RequestHeaderAuth, ports_of

BAD_REQUEST = "bad_request"
MAX_RULES = 100
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_VALUE = re.compile(r"[\x21-\x7e]{32,256}")
_MEANS_SOMETHING = frozenset(
    [
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "accept-ranges",
        "age",
        "allow",
        "authorization",
        "cache-control",
        "connection",
        "content-encoding",
        "content-language",
        "content-length",
        "content-location",
        "content-range",
        "content-type",
        "cookie",
        "cookie2",
        "date",
        "early-data",
        "expect",
        "forwarded",
        "from",
        "host",
        "http2-settings",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "keep-alive",
        "last-modified",
        "location",
        "max-forwards",
        "origin",
        "pragma",
        "range",
        "referer",
        "server",
        "set-cookie",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "upgrade-insecure-requests",
        "user-agent",
        "vary",
        "via",
        "warning",
        "www-authenticate",
        "x-real-ip",
    ]
)
_MEANS_SOMETHING_BEFORE = ("proxy-", "x-forwarded-", "sec-", "access-control-")

FindInstance = Callable[[str], str]
"""A reference → the instance's name. Raises NotFound or Conflict."""
CheckTls = Callable[[str], None]
"""Whether there is a source of certificates for a host name, in lower case. Raises InvalidRequest."""


def check_request(
    request: CreateIngressRequest, find: FindInstance, check_tls: CheckTls, now: datetime
) -> IngressRecord:
    """The record to be stored. Raises InvalidRequest, or Conflict for an ambiguous instance."""
    try:
        check_name(request.name)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, code=BAD_REQUEST) from None
    if not 1 <= len(request.rules) <= MAX_RULES:
        raise InvalidRequest(f"{len(request.rules)} rules given; an ingress has 1 to {MAX_RULES}", code=BAD_REQUEST)
    tags = check_tags(request.tags)
    rules = tuple(_check_rule(rule, find, check_tls) for rule in request.rules)
    seen: set[tuple[str, int]] = set()
    for hostname, port in ((rule.match.hostname, port) for rule in rules for port in ports_of(rule)):
        key = (shape(hostname), port)
        if key in seen:
            raise Conflict(f"two rules are for {hostname} on port {port}", code="hostname_in_use")
        seen.add(key)
    return IngressRecord(id=new_id(), name=request.name, rules=rules, created_at=now, tags=tags)


def _check_rule(rule: IngressRule, find: FindInstance, check_tls: CheckTls) -> IngressRule:
    hostname = rule.match.hostname
    try:
        labels = parse_hostname(hostname)
    except ValueError as error:
        raise InvalidRequest(f"hostname {hostname[:300]!r} {error}", code=BAD_REQUEST) from None
    if rule.redirect_http and not (rule.tls or rule.tls_passthrough):
        raise InvalidRequest("redirect_http requires tls or tls_passthrough", code=BAD_REQUEST)
    if rule.tls_passthrough and rule.tls:
        raise InvalidRequest(
            "tls and tls_passthrough exclude each other: TLS ends here or in the guest", code=BAD_REQUEST
        )
    if rule.tls_passthrough and rule.request_header_auth:
        raise InvalidRequest(
            "request_header_auth cannot be checked with tls_passthrough, which does not open requests", code=BAD_REQUEST
        )
    if rule.tls:
        check_tls(".".join(labels))
    return replace(
        rule,
        match=replace(rule.match, hostname=".".join(labels)),
        target=replace(rule.target, instance=_check_target(rule, labels, find)),
        request_header_auth=_check_auth(rule.request_header_auth),
    )


def _check_target(rule: IngressRule, labels: tuple[str, ...], find: FindInstance) -> str:
    target, known = rule.target.instance, captures(labels)
    if not 1 <= len(target) <= 255:
        raise InvalidRequest("target.instance must have 1 to 255 characters", code=BAD_REQUEST)
    try:
        used = references(target)
    except ValueError as error:
        raise InvalidRequest(f"target.instance {target!r} {error}", code=BAD_REQUEST) from None
    if unknown := used - known:
        raise InvalidRequest(
            f"target.instance {target!r}: {rule.match.hostname} has no capture {{{min(unknown)}}}", code=BAD_REQUEST
        )
    if known and not used:
        raise InvalidRequest(
            f"target.instance {target!r} must name a capture, since {rule.match.hostname} is a pattern",
            code=BAD_REQUEST,
        )
    if used:
        return target
    try:
        return find(target)
    except NotFound as error:
        raise InvalidRequest(error.message, code="instance_not_found") from None


def _check_auth(auth: RequestHeaderAuth | UnsetType | None) -> RequestHeaderAuth | UnsetType:
    if auth is UNSET or auth is None:
        return UNSET
    assert isinstance(auth, RequestHeaderAuth)
    name = auth.header.lower()
    if not _TOKEN.fullmatch(auth.header):
        raise InvalidRequest(
            f"request_header_auth.header {auth.header[:130]!r} is not a valid header name", code=BAD_REQUEST
        )
    if name in _MEANS_SOMETHING or name.startswith(_MEANS_SOMETHING_BEFORE):
        raise InvalidRequest(
            f"request_header_auth.header: {auth.header} is defined by HTTP; choose another name",
            code=BAD_REQUEST,
        )
    if not _VALUE.fullmatch(auth.value):
        raise InvalidRequest(
            "request_header_auth.value must be 32 to 256 visible ASCII characters without spaces", code=BAD_REQUEST
        )
    return auth
