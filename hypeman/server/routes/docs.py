"""The contract as a document, and a page to read it (§3.7). Rendered once, at the first request."""

from __future__ import annotations

import functools
from importlib import resources

import msgspec
import yaml

from hypeman.server.api import Page, Routes
from hypeman.server.openapi import render_document
from hypeman.server.services import Services

routes = Routes("docs")


@routes.get("/spec.json", None, media_type="application/json")
async def spec_json(services: Services) -> Page:
    """This document as JSON."""
    return Page(_spec_json(), "application/json")


@routes.get("/spec.yaml", None, media_type="application/vnd.oai.openapi")
async def spec_yaml(services: Services) -> Page:
    """This document as YAML."""
    return Page(_spec_yaml(), "application/vnd.oai.openapi")


@routes.get("/swagger", None, media_type="text/html")
async def swagger(services: Services) -> Page:
    """This document as a page."""
    return Page(_swagger(), "text/html; charset=utf-8")


@functools.cache
def _spec_json() -> bytes:
    from hypeman.server.routes import OPERATIONS  # these routes are part of what they describe

    return msgspec.json.format(msgspec.json.encode(render_document(OPERATIONS)), indent=2)


@functools.cache
def _spec_yaml() -> bytes:
    return yaml.safe_dump(msgspec.json.decode(_spec_json()), sort_keys=False, allow_unicode=True).encode()


@functools.cache
def _swagger() -> bytes:
    return resources.files("hypeman.server").joinpath("data/swagger.html").read_bytes()
