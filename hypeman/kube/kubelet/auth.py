"""Who calls the kubelet's API, and whether the cluster permits it.

A caller is known by a client certificate of the cluster's CA, which the TLS handshake has verified, or by a token,
which the API server reviews (TokenReview). What a caller may do is always the API server's decision
(SubjectAccessReview).
Decisions are kept for a while, so a scrape costs no request; only hashes of tokens are kept. If the API server does not
answer, nothing is permitted that is not kept.
Anyone who reaches the port can cause a review with an invented token; the limit on them leaves the API server and the
node's connections to its heartbeats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import trio
from cryptography import x509
from cryptography.x509.oid import NameOID
from msgspec import Struct

from hypeman.errors import Forbidden, Unauthorized
from hypeman.kube.api import ApiClient, Unreachable
from hypeman.kube.kubelet.routes import Permission

TOKEN_SECONDS = 120.0
ALLOWED_SECONDS = 300.0
DENIED_SECONDS = 30.0
_MAX_KEPT = 1000
MAX_REVIEWS = 8
"""Requests to the API server at a time."""
REVIEW_SECONDS = 30.0
"""How long a caller waits for a review."""

K = TypeVar("K", bound=Hashable)
R = TypeVar("R", bound=Struct)
V = TypeVar("V")


class Caller(Struct, frozen=True):
    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()


class _User(Struct, frozen=True):
    username: str = ""
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: dict[str, tuple[str, ...]] = {}


class _TokenStatus(Struct, frozen=True):
    authenticated: bool = False
    user: _User = _User()


class _TokenReview(Struct, frozen=True):
    status: _TokenStatus = _TokenStatus()


class _AccessStatus(Struct, frozen=True):
    allowed: bool = False
    denied: bool = False
    reason: str = ""


class _AccessReview(Struct, frozen=True):
    status: _AccessStatus = _AccessStatus()


class Kept(Generic[K, V]):
    """Values with an end, at most ``_MAX_KEPT``; the oldest go first."""

    def __init__(self) -> None:
        self._values: dict[K, tuple[float, V]] = {}

    def get(self, key: K) -> V | None:
        until, value = self._values.get(key, (0.0, None))
        return value if until > trio.current_time() else None

    def put(self, key: K, value: V, seconds: float) -> None:
        self._values.pop(key, None)
        while len(self._values) >= _MAX_KEPT:
            del self._values[next(iter(self._values))]
        self._values[key] = (trio.current_time() + seconds, value)


class Gate:
    """Lets callers through to one node's API."""

    def __init__(self, api: ApiClient, node: str) -> None:
        self._api = api
        self._node = node
        self._reviewing = trio.CapacityLimiter(MAX_REVIEWS)
        self._tokens: Kept[bytes, Caller] = Kept()
        self._decisions: Kept[tuple[Caller, str, str], bool] = Kept()

    async def check(self, certificate: bytes | None, authorization: str, permission: Permission) -> Caller:
        """The caller. ``certificate`` is DER. Raises Unauthorized, Forbidden, ApiError."""
        caller = await self._caller(certificate, authorization)
        for subresource in permission.subresources:
            if permission.verb and await self._may(caller, permission.verb, subresource):
                return caller
        wanted = " or ".join(f"nodes/{subresource}" for subresource in permission.subresources)
        raise Forbidden(f"{caller.name} may not {permission.verb or 'do this with'} {wanted} of {self._node}")

    async def _caller(self, certificate: bytes | None, authorization: str) -> Caller:
        if certificate is not None:
            return caller_of(certificate)
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("a client certificate or a bearer token of the cluster is needed")
        key = hashlib.sha256(token.encode()).digest()
        if (known := self._tokens.get(key)) is not None:
            return known
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        review = await self._review("/apis/authentication.k8s.io/v1/tokenreviews", body, _TokenReview)
        if not review.status.authenticated:
            raise Unauthorized("the cluster does not know this token")
        user = review.status.user
        caller = Caller(user.username, user.groups, user.uid, tuple(sorted(user.extra.items())))
        self._tokens.put(key, caller, TOKEN_SECONDS)
        return caller

    async def _may(self, caller: Caller, verb: str, subresource: str) -> bool:
        key = (caller, verb, subresource)
        if (known := self._decisions.get(key)) is not None:
            return known
        resource = {"verb": verb, "version": "v1", "resource": "nodes", "subresource": subresource, "name": self._node}
        spec: dict[str, Any] = {"user": caller.name, "groups": caller.groups, "resourceAttributes": resource}
        if caller.uid:
            spec["uid"] = caller.uid
        if caller.extra:
            spec["extra"] = dict(caller.extra)
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        allowed = (await self._review(path, body, _AccessReview)).status.allowed
        self._decisions.put(key, allowed, ALLOWED_SECONDS if allowed else DENIED_SECONDS)
        return allowed

    async def _review(self, path: str, body: object, kind: type[R]) -> R:
        """Raises ApiError."""
        with trio.move_on_after(REVIEW_SECONDS):
            async with self._reviewing:
                return await self._api.create(path, body, kind)
        raise Unreachable(f"no review in {REVIEW_SECONDS:g} s: there are too many callers")


def caller_of(certificate: bytes) -> Caller:
    """Who a verified client certificate names: its common name, and its organizations as groups."""
    subject = x509.load_der_x509_certificate(certificate).subject
    names = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    groups = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if not names:
        raise Unauthorized("the client certificate has no common name")
    return Caller(names[0], (*groups, "system:authenticated"))
