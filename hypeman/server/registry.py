"""The distribution API below ``/v2/`` (OCI distribution specification 1.1): for docker, skopeo, podman, crane, oras.

Its errors, headers and login differ from those of the other operations, so its routes are not declared as Operations
and are not in /spec.json. A request's log line and metrics are the same.

Login: the API's own tokens, as Bearer, or as the password (or user name) of Basic. ``/v2/token`` exchanges one for a
token of a few minutes that is good for the registry alone, and there for those of the repositories and actions that the
client names and its login permits (Docker's token authentication).
"""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlencode

import msgspec
from quart import Response, request

from hypeman.errors import HypemanError, Unauthorized
from hypeman.host.files import read_pieces
from hypeman.images.manifest import INDEX_TYPES, MAX_MANIFEST_BYTES
from hypeman.registry.names import (
    Code,
    RegistryFailure,
    Target,
    is_digest,
    parse_byte_range,
    parse_content_range,
    parse_path,
)
from hypeman.registry.service import Opened
from hypeman.server.services import RegistryService
from hypeman.tokens import Access, Caller, Grants, may_access, mint, parse_grants

_GUEST_SECONDS = 60
_TOKEN_SECONDS = 300
_MAX_SCOPES = 100
_VERSION = {"Docker-Distribution-API-Version": "registry/2.0"}
_INERT = {"Content-Security-Policy": "default-src 'none'; sandbox", "X-Content-Type-Options": "nosniff"}
"""A manifest has the media type that its uploader chose: in a browser it must not run as a page of this origin."""
_ACCESS = {
    "GET": Access.PULL,
    "HEAD": Access.PULL,
    "POST": Access.PUSH,
    "PATCH": Access.PUSH,
    "PUT": Access.PUSH,
    "DELETE": Access.DELETE,
}
_METHODS = {
    "uploads": ("POST",),
    "upload": ("GET", "PATCH", "PUT", "DELETE"),
    "blob": ("GET", "HEAD", "DELETE"),
    "manifest": ("GET", "HEAD", "PUT", "DELETE"),
    "tags": ("GET",),
    "referrers": ("GET",),
}
_GUEST = Caller("guest", frozenset())


class RegistryRoutes:
    """Views for Quart. ``admit`` authenticates a request, with the given header in place of its own."""

    def __init__(self, registry: RegistryService, admit: Callable[[Any, str | None], Caller], jwt_secret: str) -> None:
        self._registry = registry
        self._admit = admit
        self._secret = jwt_secret

    async def probe(self) -> Response:
        """``GET /v2/``: says that this is a registry, and whether the login is valid."""
        return await self._answered(self._probe)

    async def _probe(self, caller: Caller) -> Response:
        return Response(b"{}", 200, _VERSION, content_type="application/json")

    async def any(self, rest: str) -> Response:
        return await self._answered(partial(self._dispatch, rest))

    async def _answered(self, answer: Callable[[Caller], Awaitable[Response]]) -> Response:
        try:
            try:
                caller = self._admit(request, bearer(request.headers.get("Authorization")))
            except Unauthorized as error:
                raise RegistryFailure(Code.UNAUTHORIZED, error.message, headers=self._challenge()) from None
            response = await answer(caller)
        except RegistryFailure as failure:
            response = _refusal(failure)
        except HypemanError as error:
            response = _refusal(RegistryFailure(Code.UNKNOWN, error.message), error.status)
        except OSError as error:
            response = _refusal(RegistryFailure(Code.UNKNOWN, f"the blob cannot be stored: {error.strerror}"))
        response.headers.update(_VERSION | _INERT)
        return response

    def _challenge(self, missing: str = "") -> dict[str, str]:
        """``missing``: the scope that a valid token lacks."""
        realm = f"{request.scheme}://{request.host}/v2/token"
        more = f',scope="{missing}",error="insufficient_scope"' if missing else ""
        return {"WWW-Authenticate": f'Bearer realm="{realm}",service="hypeman"{more}'}

    async def token(self) -> Response:
        """``GET /v2/token``: Docker's token flow. What the login does not permit is left out; without a login,
        everything is."""
        given = bearer(request.headers.get("Authorization"))
        scopes = [scope for text in request.args.getlist("scope") for scope in text.split()]
        lifetime = _TOKEN_SECONDS
        try:
            if given is not None:
                caller = self._admit(request, given)
                if caller.expires_at is not None:
                    lifetime = max(1, min(lifetime, int(caller.expires_at - time.time())))
            elif scopes:
                caller, lifetime = _GUEST, _GUEST_SECONDS
            else:
                raise Unauthorized("log in with a token of the API as password")
            text = mint(self._secret, subject=caller.subject, grants=_granted(caller, scopes), lifetime=lifetime)
        except HypemanError as error:
            failure = RegistryFailure(
                Code.UNAUTHORIZED, error.message, headers={"WWW-Authenticate": 'Basic realm="hypeman"'}
            )
            return _refusal(failure)
        issued = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {"token": text, "access_token": text, "expires_in": lifetime, "issued_at": issued}
        return Response(msgspec.json.encode(body), 200, content_type="application/json")

    async def _dispatch(self, rest: str, caller: Caller) -> Response:
        target = parse_path(rest)
        allowed = _METHODS[target.kind]
        if request.method not in allowed:
            headers = {"Allow": ", ".join(allowed)}
            raise RegistryFailure(Code.UNSUPPORTED, f"this path takes {headers['Allow']}", headers=headers)
        own_upload = target.kind == "upload"
        self._check(caller, target.repository, Access.PUSH if own_upload else _ACCESS[request.method])
        if target.kind == "uploads":
            return await self._post_uploads(target, caller)
        handler: Callable[[Target], Awaitable[Response]] = getattr(self, f"_{request.method.lower()}_{target.kind}")
        return await handler(target)

    def _check(self, caller: Caller, repository: str, access: Access) -> None:
        """Raises RegistryFailure: UNAUTHORIZED for a token of the token service, so that the client asks it for
        another one; DENIED otherwise."""
        if may_access(caller, repository, access):
            return
        message = f"the token does not permit {access} in {repository}"
        if caller.grants is None:
            raise RegistryFailure(Code.DENIED, message)
        actions = "pull,push" if access is Access.PUSH else access.value
        headers = self._challenge(f"repository:{repository}:{actions}")
        raise RegistryFailure(Code.UNAUTHORIZED, message, headers=headers)

    # Blobs

    async def _get_blob(self, target: Target) -> Response:
        return _content(await self._registry.blob(target.repository, target.reference))

    _head_blob = _get_blob

    async def _delete_blob(self, target: Target) -> Response:
        await self._registry.delete_blob(target.repository, target.reference)
        return Response(b"", 202)

    async def _post_uploads(self, target: Target, caller: Caller) -> Response:
        repository, query = target.repository, _query()
        mount, source = query.get("mount", ""), query.get("from", "")
        if (
            mount
            and (may_access(caller, source, Access.PULL) if source else caller.grants is None)
            and await self._registry.mount(repository, mount, source)
        ):
            return _created(f"/v2/{repository}/blobs/{mount}", mount)
        if digest := query.get("digest"):
            await self._registry.put_blob(repository, digest, request.body)
            return _created(f"/v2/{repository}/blobs/{digest}", digest)
        name = await self._registry.begin(repository)
        return self._upload(202, repository, name, 0)

    def _upload(self, status: int, repository: str, name: str, size: int) -> Response:
        headers = {
            "Location": f"/v2/{repository}/blobs/uploads/{name}",
            "Range": f"0-{max(0, size - 1)}",
            "Docker-Upload-UUID": name,
            "Content-Length": "0",
        }
        return Response(b"", status, headers)

    async def _get_upload(self, target: Target) -> Response:
        upload = self._registry.upload(target.repository, target.reference)
        return self._upload(204, target.repository, target.reference, upload.size)

    async def _patch_upload(self, target: Target) -> Response:
        size = await self._registry.receive(target.repository, target.reference, request.body, _span())
        return self._upload(202, target.repository, target.reference, size)

    async def _put_upload(self, target: Target) -> Response:
        digest = _query().get("digest")
        if digest is None:
            raise RegistryFailure(Code.DIGEST_INVALID, "the digest is missing")
        await self._registry.receive(target.repository, target.reference, request.body, _span())
        await self._registry.finish(target.repository, target.reference, digest)
        return _created(f"/v2/{target.repository}/blobs/{digest}", digest)

    async def _delete_upload(self, target: Target) -> Response:
        await self._registry.cancel(target.repository, target.reference)
        return Response(b"", 204)

    # Manifests

    async def _get_manifest(self, target: Target) -> Response:
        return _content(await self._registry.manifest(target.repository, target.reference))

    _head_manifest = _get_manifest

    async def _put_manifest(self, target: Target) -> Response:
        is_digest(target.reference)
        data = bytearray()
        async for chunk in request.body:
            data += chunk
            if len(data) > MAX_MANIFEST_BYTES:
                raise RegistryFailure(Code.SIZE_INVALID, f"a manifest may have {MAX_MANIFEST_BYTES} bytes at most")
        media_type = (request.headers.get("Content-Type") or "").partition(";")[0].strip()
        digest, subject = await self._registry.put_manifest(
            target.repository, target.reference, bytes(data), media_type
        )
        response = _created(f"/v2/{target.repository}/manifests/{target.reference}", digest)
        if subject:
            response.headers["OCI-Subject"] = subject
        return response

    async def _delete_manifest(self, target: Target) -> Response:
        await self._registry.delete_manifest(target.repository, target.reference)
        return Response(b"", 202)

    async def _get_tags(self, target: Target) -> Response:
        query = _query()
        limit = query.get("n")
        if limit is not None and not (limit.isdigit() and len(limit) < 9):
            raise RegistryFailure(Code.UNSUPPORTED, "n must be a number")
        found, more = await self._registry.tags(
            target.repository, last=query.get("last", ""), limit=None if limit is None else int(limit)
        )
        response = _json({"name": target.repository, "tags": found})
        if more and found:
            following = urlencode({"n": limit or len(found), "last": found[-1]})
            response.headers["Link"] = f'</v2/{target.repository}/tags/list?{following}>; rel="next"'
        return response

    async def _get_referrers(self, target: Target) -> Response:
        wanted = _query().get("artifactType", "")
        data = await self._registry.referrers(target.repository, target.reference, wanted)
        response = Response(data, 200, content_type=INDEX_TYPES[0])
        if wanted:
            response.headers["OCI-Filters-Applied"] = "artifactType"
        return response


def _granted(caller: Caller, scopes: Sequence[str]) -> Grants:
    """What of the requested ``scopes`` (``repository:NAME:ACTION,…``) the caller's login permits. Pure."""
    wanted = [scope.removeprefix("repository:") for scope in scopes[:_MAX_SCOPES] if scope.startswith("repository:")]
    return frozenset(grant for scope in wanted for grant in parse_grants(scope) if may_access(caller, *grant))


def bearer(authorization: str | None) -> str | None:
    """An Authorization header as a Bearer one: of Basic, the part that looks like a token. Pure."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return authorization
    return f"Bearer {password if password.count('.') == 2 or user.count('.') != 2 else user}"


def _query() -> dict[str, str]:
    found = parse_qs(request.query_string.decode(errors="replace"), keep_blank_values=True)
    return {key: values[-1] for key, values in found.items()}


def _span() -> tuple[int, int] | None:
    text = request.headers.get("Content-Range")
    return None if text is None else parse_content_range(text)


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), 200, content_type="application/json")


def _created(location: str, digest: str) -> Response:
    return Response(b"", 201, {"Location": location, "Docker-Content-Digest": digest, "Content-Length": "0"})


def _refusal(failure: RegistryFailure, status: int | None = None) -> Response:
    body = msgspec.json.encode(failure.body)
    return Response(body, status or failure.status, failure.headers, content_type="application/json")


def _content(found: Opened) -> Response:
    headers = {"Docker-Content-Digest": found.digest, "ETag": f'"{found.digest}"', "Accept-Ranges": "bytes"}
    try:
        span = parse_byte_range(request.headers["Range"], found.size) if "Range" in request.headers else None
        first, end = span or (0, found.size)
        if span is not None:
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{found.size}"
        if request.method == "HEAD":
            os.close(found.fd)
            response = Response(b"", 200, headers, content_type=found.media_type)
            response.headers["Content-Length"] = str(found.size)
            return response
    except RegistryFailure:
        os.close(found.fd)
        raise
    response = Response(
        read_pieces(found.fd, first, end), 200 if span is None else 206, headers, content_type=found.media_type
    )
    response.headers["Content-Length"] = str(end - first)
    response.timeout = None
    return response
