"""Browser sessions of the web UI: a cookie instead of a token, and what keeps other sites from using it.

A login exchanges a token, or a link that works once, for a random value in a cookie. The store has a row under the
value's HMAC with the server's secret: what is read from the store opens nothing, and a new secret ends all sessions.

- A session has its caller's scopes and ends after SESSION, with its token, or by a logout; it survives a restart.
- It is bound to the ``Host`` at which it began. A page of another name that resolves to this server (DNS rebinding) has
  neither the cookie nor the host.
- A request that may change something, and each WebSocket, must come from a page of the same origin. Browsers state it
  in ``Origin``, and a page cannot forge it.
- Cookies ignore ports, so the cookie's name has the port: two servers behind one name do not log each other out.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from hypeman.errors import Forbidden, Unauthorized
from hypeman.store import Store, Table, Txn
from hypeman.tokens import Caller

SESSION = 12 * 3600
"""Seconds."""
LINK = 120
"""Seconds that a link works."""
MAX_SESSIONS = 1000
MAX_OF_ONE = 50
"""Of one subject: logging in often does not end the sessions of others."""
MAX_LINKS = 100
COOKIE = "hypeman_session"
SAFE_METHODS = frozenset(["GET", "HEAD"])

Header = Callable[[str], str | None]


class SessionRow(Struct, frozen=True):
    subject: str
    permissions: tuple[str, ...] | None
    """None: full access."""
    host: str
    expires_at: float


SESSIONS: Table[SessionRow] = Table("ui-sessions", SessionRow)


class WrongOrigin(Forbidden):
    """A page of another site, or of another name of this server, made the request."""

    default_code = "wrong_origin"


class Sessions:
    """Sessions in ``store``; ``secret`` is that of the server's tokens."""

    def __init__(self, store: Store, secret: str, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._secret = secret.encode()
        self._now = now
        self._links: dict[str, tuple[Caller, float]] = {}
        """The caller of a link, and when it stops working, by the digest of its code; the oldest first."""

    async def begin(self, caller: Caller, host: str) -> tuple[str, float]:
        """A new session of ``caller``: the cookie's value, and when it ends. The oldest of too many are ended."""
        value = secrets.token_urlsafe(32)
        ends = min(self._now() + SESSION, caller.expires_at or float("inf"))
        permissions = None if caller.permissions is None else tuple(sorted(caller.permissions))
        row = SessionRow(caller.subject, permissions, host, ends)

        def write(txn: Txn) -> None:
            total, kept = 1, {caller.subject: 1}
            for key, other in sorted(txn.scan(SESSIONS), key=lambda row: row[1].expires_at, reverse=True):
                kept[other.subject] = kept.get(other.subject, 0) + 1
                over = kept[other.subject] > MAX_OF_ONE or total >= MAX_SESSIONS
                if other.expires_at <= self._now() or over:
                    txn.delete(SESSIONS, key)
                else:
                    total += 1
            txn.put(SESSIONS, self._key(value), row)

        await self._store.write(write)
        return value, ends

    def caller(self, value: str, host: str) -> Caller:
        """The caller of the session. Raises Unauthorized, WrongOrigin."""
        row = self._store.read(lambda txn: txn.get(SESSIONS, self._key(value)))
        if row is None or row.expires_at <= self._now():
            raise Unauthorized("the session has ended; log in again")
        if row.host != host:
            raise WrongOrigin("the session began under another host name; log in again under this one")
        return Caller(row.subject, None if row.permissions is None else frozenset(row.permissions), row.expires_at)

    async def end(self, value: str) -> None:
        """Idempotent."""
        key = self._key(value)
        await self._store.write(lambda txn: txn.delete(SESSIONS, key))

    def make_link(self, caller: Caller) -> tuple[str, float]:
        """A code that logs in as ``caller`` once, and when it stops working. It is kept in memory only."""
        now = self._now()
        self._links = {key: link for key, link in self._links.items() if link[1] > now}
        if len(self._links) >= MAX_LINKS:
            del self._links[next(iter(self._links))]
        code = secrets.token_urlsafe(32)
        self._links[self._key(code)] = caller, now + LINK
        return code, now + LINK

    def use_link(self, code: str) -> Caller:
        """The caller who made the link; from now on it is used. Raises Unauthorized."""
        caller, ends = self._links.pop(self._key(code), (None, 0.0))
        if caller is None or ends <= self._now():
            raise Unauthorized("this link was used already or is too old; `hypeman ui` makes a new one")
        return caller

    def _key(self, value: str) -> str:
        return hmac.new(self._secret, value.encode(errors="replace"), hashlib.sha256).hexdigest()


def cookie_name(host: str) -> str:
    """The cookie for a server that the browser reaches as ``host``."""
    port = host.rpartition(":")[2] if not host.endswith("]") else ""
    return f"{COOKIE}_{port}" if port.isdecimal() and port.isascii() and host.count(":") else COOKIE


def check_origin(header: Header, *, safe: bool) -> None:
    """Raise WrongOrigin unless a page of this very host made the request. ``safe`` ones may come without ``Origin``."""
    host, origin, site = header("Host") or "", header("Origin"), header("Sec-Fetch-Site")
    if site not in (None, "same-origin", "none"):
        raise WrongOrigin(f"the request comes from another site ({site[:20]})")
    if origin is None:
        if not safe:
            raise WrongOrigin("a request with a session must have the header Origin, which browsers send")
    elif not same_host(origin, host):
        raise WrongOrigin("the request comes from a page of another origin; a proxy in between must pass on Host")


def same_host(origin: str, host: str) -> bool:
    """Whether a page of ``origin`` belongs to the server that is asked as ``host``."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc != "" and parts.netloc.lower() == host.lower()


def check_local_browser(header: Header, *, safe: bool) -> None:
    """Raise WrongOrigin for a browser's request over a trusted socket (as through ``ssh -L``) from a page of another
    site, or under a name of the public DNS, which may resolve to this server: the socket itself asks for no token."""
    if not is_browser(header):
        return
    if header("Origin") is not None or header("Sec-Fetch-Site") is not None:
        check_origin(header, safe=safe)
    if not is_local_name(header("Host") or ""):
        raise WrongOrigin("over this socket a browser must use localhost, an address, or a name without dots")


def is_browser(header: Header) -> bool:
    agent = header("User-Agent") or ""
    return agent.startswith("Mozilla/") or header("Origin") is not None or header("Sec-Fetch-Site") is not None


def is_local_name(host: str) -> bool:
    """Whether ``host``, with or without a port, is no name of the public DNS."""
    name = urlsplit(f"//{host}").hostname if host.count("[") == host.count("]") else None
    if not name:
        return not host
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(".localhost")
    return True


class LoginRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two."""

    token: str = ""
    link: str = ""

    def __repr__(self) -> str:
        return "LoginRequest(…)"
