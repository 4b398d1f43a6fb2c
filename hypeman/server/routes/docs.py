"""The contract as a document, and a page to read it (§3.7). Rendered once, at the first request."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from importlib import resources

import msgspec
import yaml

from hypeman.server.api import Operation, Page, Routes
from hypeman.server.openapi import render_document
from hypeman.server.services import Services
from hypeman.server.streams import WEBSOCKETS


def docs_routes(others: Sequence[Operation]) -> Routes:
    """The routes that serve the document of ``others`` and of themselves."""
    routes = Routes("docs")

    @functools.cache
    def document() -> bytes:
        operations = (*others, *routes.operations)
        return msgspec.json.format(msgspec.json.encode(render_document(operations, WEBSOCKETS)), indent=2)

    @functools.cache
    def yaml_document() -> bytes:
        return yaml.safe_dump(msgspec.json.decode(document()), sort_keys=False, allow_unicode=True).encode()

    @routes.get("/spec.json", None, media_type="application/json")
    async def spec_json(services: Services) -> Page:
        """This document as JSON."""
        return Page(document(), "application/json")

    @routes.get("/spec.yaml", None, media_type="application/vnd.oai.openapi")
    async def spec_yaml(services: Services) -> Page:
        """This document as YAML."""
        return Page(yaml_document(), "application/vnd.oai.openapi")

    @routes.get("/swagger", None, media_type="text/html", headers=_headers(_swagger()))
    async def swagger(services: Services) -> Page:
        """This document as a page, on which each operation can be tried."""
        return Page(_swagger(), "text/html; charset=utf-8")

    return routes


def _headers(page: bytes) -> dict[str, str]:
    """A policy that admits the page's own script and style, by their digests, and requests to this server."""

    def digests(tag: bytes) -> str:
        parts = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)

    policy = (
        f"default-src 'none'; script-src {digests(b'script')}; style-src {digests(b'style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@functools.cache
def _swagger() -> bytes:
    return resources.files("hypeman.server").joinpath("data/swagger.html").read_bytes()
