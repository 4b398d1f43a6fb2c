"""Ingresses: API types (the contract's §2.9) and stored records."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.fields import Name, Port, TagMap, Timestamp


class IngressMatch(Struct, frozen=True, kw_only=True):
    """Which requests a rule is for."""

    hostname: Annotated[
        str,
        Meta(
            description="A host name, or a pattern in which {name} stands for one whole label",
            examples=["web.example.com", "{instance}.example.com"],
        ),
    ]
    port: Annotated[Port, Meta(description="Port of the host on which to listen")] = 80


class IngressTarget(Struct, frozen=True, kw_only=True):
    """Where requests go."""

    instance: Annotated[
        str,
        Meta(description="Name or id; with a pattern, a text with captures ({instance}), looked up for each request"),
    ]
    port: Annotated[Port, Meta(description="Port of the guest")]


class RequestHeaderAuth(Struct, frozen=True, kw_only=True):
    """A header that requests must have. It is not passed on to the guest."""

    header: Annotated[str, Meta(description="A header that has no meaning of its own in HTTP")]
    value: Annotated[str, Meta(description="32 to 256 visible ASCII characters")]


class IngressRule(Struct, frozen=True, kw_only=True):
    match: IngressMatch
    target: IngressTarget
    tls: Annotated[bool, Meta(description="Terminate TLS; the host name needs a source of certificates")] = False
    redirect_http: Annotated[
        bool, Meta(description="Redirect HTTP on port 80 to HTTPS; only with tls or tls_passthrough")
    ] = False
    tls_passthrough: Annotated[
        bool,
        Meta(
            description="Carry TLS connections whose server name is the host name to the guest without opening them; "
            "the guest has the certificate. Not with tls or request_header_auth"
        ),
    ] = False
    request_header_auth: RequestHeaderAuth | UnsetType | None = UNSET


class CertificateState(enum.StrEnum):
    """``pending``: being obtained. ``failed``: there is none. An ``expired`` one is still presented."""

    VALID = "valid"
    PENDING = "pending"
    EXPIRED = "expired"
    FAILED = "failed"


class IngressCertificate(Struct, frozen=True, kw_only=True):
    """The certificate of a host name."""

    hostname: Annotated[str, Meta(description="As in the rule")]
    state: CertificateState
    source: Annotated[Literal["file", "internal", "acme"] | UnsetType, Meta(description="Absent if there is none")] = (
        UNSET
    )
    not_after: Timestamp | UnsetType = UNSET
    error: Annotated[str | UnsetType, Meta(description="What is wrong, or why the last renewal failed")] = UNSET


class CreateIngressRequest(Struct, frozen=True, kw_only=True):
    """Route requests for host names to instances."""

    name: Name
    rules: Annotated[tuple[IngressRule, ...], Meta(description="1 to 100 rules")]
    tags: TagMap = {}


class Ingress(Struct, frozen=True, kw_only=True):
    """Rules that route requests for host names to instances."""

    id: str
    name: str
    rules: tuple[IngressRule, ...]
    created_at: Timestamp
    tags: TagMap | UnsetType = UNSET
    certificates: Annotated[
        tuple[IngressCertificate, ...] | UnsetType, Meta(description="Of the rules with tls; absent without such rules")
    ] = UNSET


class IngressRecord(Struct, frozen=True, kw_only=True):
    """As stored. Rules are checked, host names are in lower case, and targets that are no patterns are names."""

    id: str
    name: str
    rules: tuple[IngressRule, ...]
    created_at: Timestamp
    tags: dict[str, str] = {}

    @property
    def ports(self) -> frozenset[int]:
        """Of the host, on which it needs a listener."""
        return frozenset(port for rule in self.rules for port in ports_of(rule))

    @property
    def tls_hosts(self) -> frozenset[str]:
        """Host names that need certificates."""
        return frozenset(rule.match.hostname for rule in self.rules if rule.tls)


HTTP_PORT = 80
"""Where requests are redirected to HTTPS, and where public CAs look for answers to HTTP-01."""


def ports_of(rule: IngressRule) -> tuple[int, ...]:
    """Of the host, on which the rule takes requests for its host name."""
    if rule.redirect_http and rule.match.port != HTTP_PORT:
        return (rule.match.port, HTTP_PORT)
    return (rule.match.port,)
