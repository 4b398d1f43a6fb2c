"""The web UI below ``/ui/``: its files, and the login that gives its pages a session (sessions.py).

The files are built from ``hypeman/ui`` by ``make ui``. They are read once, so a path is a key and never a file name.
What is below ``assets/`` has its content's hash in its name and is cached for good; every other path is the page
itself, which asks the API as any client does.

These routes are for the UI's own pages and ``hypeman ui``; they are not Operations and are not in /spec.json.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import trio
from quart import Response, request

from hypeman import __version__
from hypeman.errors import InvalidRequest, NotFound, Unauthorized
from hypeman.server.decode import decode_body
from hypeman.server.sessions import LoginRequest, Sessions, check_origin, cookie_name
from hypeman.tokens import Caller, Scope, Verifier, has_scope

_LOGIN = msgspec.json.Decoder(LoginRequest)
_ANY = tuple(Scope)
PAGE = "index.html"
FOREVER = "public, max-age=31536000, immutable"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_COMPRESSED = frozenset([".html", ".js", ".css", ".svg", ".json", ".webmanifest"])


@dataclass(frozen=True)
class StaticFile:
    content: bytes
    compressed: bytes | None
    media_type: str
    etag: str
    immutable: bool


def read_files(folder: Path | None) -> Mapping[str, StaticFile]:
    """The built UI by path below ``/ui/``; empty if it was not built."""
    files: dict[str, StaticFile] = {}
    if folder is None or not (folder / PAGE).is_file():
        return files
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
            if media_type.startswith("text/"):
                media_type += "; charset=utf-8"
            compressed = gzip.compress(content, 9, mtime=0) if path.suffix in _COMPRESSED else None
            etag = hashlib.sha256(content).hexdigest()[:20]
            files[name] = StaticFile(content, compressed, media_type, etag, name.startswith("assets/"))
    return files


class UiRoutes:
    """Views for Quart. ``admit`` authenticates a request and checks that it has one of the scopes; ``read_body`` reads
    a bounded JSON body."""

    def __init__(
        self,
        folder: Path | None,
        sessions: Sessions,
        verifier: Verifier,
        *,
        url: str,
        admit: Callable[..., Caller],
        read_body: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._folder = folder
        self._sessions = sessions
        self._verifier = verifier
        self._url = url
        """Of the server over TCP, as seen on this host; empty if it does not listen there."""
        self._admit = admit
        self._read_body = read_body
        self._files: Mapping[str, StaticFile] = {}

    async def root(self) -> Response:
        """``GET /``: for browsers, the UI. Others get what they always got."""
        if "text/html" not in request.headers.get("Accept", ""):
            raise NotFound("there is no GET /", code="Not Found")
        return Response(b"", 303, {"Location": "/ui/", "Vary": "Accept", **HEADERS})

    async def page(self) -> Response:
        return await self.file(PAGE)

    async def file(self, rest: str) -> Response:
        if not self._files:
            self._files = await trio.to_thread.run_sync(read_files, self._folder)
            if not self._files:
                raise NotFound("the web UI was not built; `make ui` builds it", code="ui_not_built")
        found = self._files.get(rest)
        if found is None:
            if "." in rest.rpartition("/")[2] or rest.startswith("assets/"):
                raise NotFound(f"there is no /ui/{rest[:200]}", code="Not Found")
            found = self._files[PAGE]  # the page shows what the path says
        headers = {
            **HEADERS,
            "Cache-Control": FOREVER if found.immutable else "no-cache",
            "ETag": f'"{found.etag}"',
            "Vary": "Accept-Encoding",
        }
        if f'"{found.etag}"' in request.headers.get("If-None-Match", ""):
            response = Response(b"", 304, headers)
            del response.headers["Content-Type"]
            return response
        content = found.content
        if found.compressed is not None and "gzip" in request.headers.get("Accept-Encoding", ""):
            content = found.compressed
            headers["Content-Encoding"] = "gzip"
        return Response(content, 200, headers, content_type=found.media_type)

    async def show(self) -> Response:
        """``GET /ui/session``: who is logged in, and with which scopes."""
        return _json(_described(self._admit(request, *_ANY, cookie=True)))

    async def login(self) -> Response:
        """``POST /ui/session``: exchange a token or a link for a session."""
        host = request.headers.get("Host", "")
        check_origin(request.headers.get, safe=False)
        asked = decode_body(await self._read_body(), _LOGIN)
        if bool(asked.token) == bool(asked.link):
            raise InvalidRequest("give either a token or a link")
        if asked.link:
            caller = self._sessions.use_link(asked.link)
        else:
            caller = self._verifier.caller(f"Bearer {asked.token.strip()}")
            if not any(has_scope(caller, scope) for scope in Scope):
                raise Unauthorized("this token has no scope")
        value, ends = await self._sessions.begin(caller, host)
        response = _json(_described(Caller(caller.subject, caller.permissions, ends)))
        self._set_cookie(response, host, value, max_age=max(0, int(ends - time.time())))
        return response

    async def logout(self) -> Response:
        """``DELETE /ui/session``."""
        host = request.headers.get("Host", "")
        check_origin(request.headers.get, safe=False)
        value = request.cookies.get(cookie_name(host))
        if value:
            await self._sessions.end(value)
        response = Response(b"", 204, HEADERS)
        del response.headers["Content-Type"]
        self._set_cookie(response, host, "", max_age=0)
        return response

    async def link(self) -> Response:
        """``POST /ui/links``: a link that logs in as the caller, once."""
        caller = self._admit(request, *_ANY, cookie=True)
        code, ends = self._sessions.make_link(caller)
        # In the fragment, which browsers do not send: it is in no log and no Referer.
        path = f"/ui/#link={code}"
        answer = {"path": path, "url": self._url and self._url + path, "expires_at": _time(ends)}
        return _json(answer, 201)

    def _set_cookie(self, response: Response, host: str, value: str, *, max_age: int) -> None:
        response.set_cookie(
            cookie_name(host),
            value,
            max_age=max_age,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=(request.headers.get("Origin") or "").startswith("https:"),
        )


def _described(caller: Caller) -> dict[str, Any]:
    return {
        "subject": caller.subject,
        "scopes": [scope for scope in Scope if has_scope(caller, scope)],
        "expires_at": None if caller.expires_at is None else _time(caller.expires_at),
        "version": __version__,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _json(answer: Any, status: int = 200) -> Response:
    headers = {**HEADERS, "Cache-Control": "no-store"}
    return Response(msgspec.json.encode(answer), status, headers, content_type="application/json")
