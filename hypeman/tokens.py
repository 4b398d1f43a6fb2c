"""Authentication and authorization: JSON Web Tokens (§1.2) and scopes (§1.3).

The only effect is that ``verify`` reads the clock. The module is not pure: PyJWT loads ssl.

Rules:
- Only HMAC signatures are accepted; the list of algorithms is fixed here, never taken from the token.
- A token made for a builder VM is never an API token, regardless of its signing key.
- Without a ``permissions`` claim a token has full access (for compatibility with old tokens), with one
  only the scopes it names; ``*`` names all.
- With a ``repo_access`` claim a token is for the registry alone, and there for the repositories that it names.
- No token, claim or secret is ever part of a message.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable
from typing import Any

import jwt
from msgspec import Struct

from hypeman.errors import Forbidden, InvalidRequest, Unauthorized

TOKEN_LIFETIME = 24 * 3600
_ALGORITHMS = ("HS256", "HS384", "HS512")
_BUILDER_CLAIMS = ("repos", "scope", "build_id")
_MOST_KNOWN = 1000
_BUILDER_SUBJECT = "builder-"


class Scope(enum.StrEnum):
    """Permissions that a token can have."""

    INSTANCE_READ = "instance:read"
    INSTANCE_WRITE = "instance:write"
    INSTANCE_DELETE = "instance:delete"
    IMAGE_READ = "image:read"
    IMAGE_WRITE = "image:write"
    IMAGE_DELETE = "image:delete"
    VOLUME_READ = "volume:read"
    VOLUME_WRITE = "volume:write"
    VOLUME_DELETE = "volume:delete"
    SNAPSHOT_READ = "snapshot:read"
    SNAPSHOT_WRITE = "snapshot:write"
    SNAPSHOT_DELETE = "snapshot:delete"
    BUILD_READ = "build:read"
    BUILD_WRITE = "build:write"
    BUILD_DELETE = "build:delete"
    DEVICE_READ = "device:read"
    DEVICE_WRITE = "device:write"
    DEVICE_DELETE = "device:delete"
    INGRESS_READ = "ingress:read"
    INGRESS_WRITE = "ingress:write"
    INGRESS_DELETE = "ingress:delete"
    RESOURCE_READ = "resource:read"
    RESOURCE_WRITE = "resource:write"


EVERYTHING = "*"
_NAMES = frozenset(Scope) | {EVERYTHING}


class Access(enum.StrEnum):
    """What may be done in a repository of the registry."""

    PULL = "pull"
    PUSH = "push"
    DELETE = "delete"


_ACCESS_SCOPES = {
    Access.PULL: Scope.IMAGE_READ,
    Access.PUSH: Scope.IMAGE_WRITE,
    Access.DELETE: Scope.IMAGE_DELETE,
}
Grants = frozenset[tuple[str, Access]]
"""Repositories, and what may be done in each of them."""


class Caller(Struct, frozen=True):
    """The authenticated caller. ``permissions`` is None for full access."""

    subject: str
    permissions: frozenset[str] | None = None
    expires_at: float | None = None
    """Seconds since 1970; None: never."""
    grants: Grants | None = None
    """Of a token for the registry alone; None: the permissions decide, for every repository."""


LOCAL = Caller("local")
"""A caller admitted by the permissions of the unix socket."""

NOBODY = Caller("", frozenset())
"""The caller of an operation without authentication."""


def mint(
    secret: str,
    *,
    subject: str,
    scopes: Iterable[str] | None = None,
    lifetime: int = TOKEN_LIFETIME,
    grants: Grants | None = None,
) -> str:
    """A token for ``subject``, valid for ``lifetime`` seconds; ``scopes`` None allows everything. With ``grants``, one
    for the registry alone.

    Raises InvalidRequest for an empty secret or an unknown scope.
    """
    if not secret:
        raise InvalidRequest("a token needs the server's secret: set JWT_SECRET or jwt_secret in the configuration")
    now = int(time.time())
    claims: dict[str, Any] = {"sub": subject, "iat": now, "exp": now + lifetime}
    if scopes is not None:
        claims["permissions"] = check_names(scopes)
    if grants is not None:
        claims["repo_access"] = [{"repo": repository, "scope": access.value} for repository, access in sorted(grants)]
    return jwt.encode(claims, secret, algorithm="HS256")


def parse_grants(text: str) -> Grants:
    """Those in ``REPOSITORY[:ACTION,…]`` as in Docker's token protocol, where ``*`` is every action; by default
    ``pull,push``. Unknown actions grant nothing."""
    repository, colon, actions = text.rpartition(":")
    if not colon or "/" in actions:  # the colon of a host's port
        repository, actions = text, "pull,push"
    named = set(actions.split(","))
    return frozenset((repository, access) for access in Access if access in named or "*" in named)


def check_names(scopes: Iterable[str]) -> list[str]:
    """``scopes`` as a list. Raises InvalidRequest naming those that do not exist."""
    names = list(scopes)
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        raise InvalidRequest(f"unknown scope {', '.join(unknown)}; `hypeman token --list-scopes` shows all")
    return names


def verify(authorization: str | None, secret: str) -> Caller:
    """The caller behind an ``Authorization`` header. Raises Unauthorized with the reason."""
    if not authorization:
        raise Unauthorized("the Authorization header is missing; send 'Bearer <token>'")
    scheme, separator, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not separator or not token or " " in token:
        raise Unauthorized("the Authorization header must read 'Bearer <token>'")
    if not secret:
        raise Unauthorized("this server has no jwt_secret, so no token can be valid")
    try:
        claims = jwt.decode(token, secret, algorithms=list(_ALGORITHMS), options={"verify_aud": False})
    except jwt.ExpiredSignatureError:
        raise Unauthorized("the token has expired") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError):  # PyJWT raises the others on malformed claims
        raise Unauthorized("the token is not valid here") from None
    subject, permissions, expires_at = claims.get("sub", ""), claims.get("permissions"), claims.get("exp")
    # PyJWT also accepts a string of digits as a time. RFC 7519 requires a number, and the cache compares numbers.
    if expires_at is not None and (isinstance(expires_at, bool) or not isinstance(expires_at, int | float)):
        raise Unauthorized("the token's exp must be a number")
    if not isinstance(subject, str):
        raise Unauthorized("the token's sub must be a string")
    if any(claim in claims for claim in _BUILDER_CLAIMS) or subject.startswith(_BUILDER_SUBJECT):
        raise Unauthorized("this token was made for a builder and does not open the API")
    if "repo_access" in claims:
        return Caller(subject, frozenset(), expires_at, _grants_of(claims["repo_access"]))
    if permissions is None:
        return Caller(subject, None, expires_at)
    if not isinstance(permissions, list) or not all(isinstance(name, str) for name in permissions):
        raise Unauthorized("the token's permissions must be a list of scope names")
    return Caller(subject, None if EVERYTHING in permissions else frozenset(permissions), expires_at)


def _grants_of(claim: Any) -> Grants:
    """Those of the claim ``repo_access``; ``push`` includes ``pull``. Raises Unauthorized."""
    found: set[tuple[str, Access]] = set()
    try:
        for entry in claim:
            repository, access = entry["repo"], Access(entry["scope"])
            if not isinstance(repository, str):
                raise TypeError
            found.add((repository, access))
            if access is Access.PUSH:
                found.add((repository, Access.PULL))
    except (TypeError, KeyError, ValueError):
        raise Unauthorized("the token's repo_access must be a list of objects with repo and scope") from None
    return frozenset(found)


class Verifier:
    """``verify`` with a cache: a signature is checked once per token, its expiry every time. This saves a
    sixth of the cost of a small request. Only valid tokens are cached."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._known: dict[str, Caller] = {}

    def caller(self, authorization: str | None) -> Caller:
        """The caller behind an ``Authorization`` header. Raises Unauthorized."""
        known = self._known.get(authorization or "")
        if known is None or (known.expires_at is not None and known.expires_at <= time.time()):
            known = verify(authorization, self._secret)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[authorization or ""] = known
        return known


def may_access(caller: Caller, repository: str, access: Access) -> bool:
    """Whether ``caller`` may do this in a repository of the registry."""
    if caller.grants is not None:
        return (repository, access) in caller.grants
    return has_scope(caller, _ACCESS_SCOPES[access])


def has_scope(caller: Caller, scope: Scope) -> bool:
    return caller.permissions is None or scope in caller.permissions


def check_scope(caller: Caller, *scopes: Scope) -> None:
    """Raise Forbidden unless ``caller`` has one of ``scopes``."""
    if caller.grants is not None:
        raise Forbidden("the token is for the registry alone (/v2/)")
    if not any(has_scope(caller, scope) for scope in scopes):
        raise Forbidden(f"the token lacks the scope {' or '.join(scopes)}")
