"""A stack as the rest of ``compose`` sees it, whichever format its file has. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from hypeman.cli.compose.watching import Rule
from hypeman.ids import SERVICE_TAG, STACK_TAG

NAME_TAG = STACK_TAG
RESOURCE_TAG = "hypeman.compose.resource"
HASH_TAG = "hypeman.compose.hash"
COPY = "copy"
"""Resource of a volume whose name follows from its content."""


class ComposeError(Exception):
    """The file cannot be used; the message names the place."""


class Tagged(Struct, frozen=True):
    """A value of a file with ``!reset`` (the key is gone) or ``!override`` (it replaces instead of being merged)."""

    value: Any
    reset: bool


class CopiedFile(Struct, frozen=True):
    """A file in a guest."""

    path: str
    """In the guest, without a slash in front."""
    mode: int
    uid: int = 0
    gid: int = 0
    source: str = ""
    """The file here; empty: it has ``content``."""
    content: str = ""


class Volume(Struct, frozen=True):
    key: str
    name: str
    size_gb: int
    source: str = ""
    """Directory here that it is filled from when it is made (``copies``)."""
    files: tuple[CopiedFile, ...] = ()
    """That it is filled with when it is made, instead of ``source``."""
    by_content: bool = False
    """Its name follows from the content of what it is filled from."""
    external: bool = False
    """It is not the stack's: neither made nor deleted."""

    @property
    def copied(self) -> str:
        """What it is filled from, in words; empty if it begins empty."""
        return self.source or ", ".join(file.source or f"/{file.path}" for file in self.files)


class Ingress(Struct, frozen=True):
    name: str
    body: dict[str, Any]
    """CreateIngressRequest without tags."""


class Service(Struct, frozen=True):
    key: str
    name: str
    """Of its instance."""
    body: dict[str, Any]
    """CreateInstanceRequest without tags and volumes."""
    mounts: tuple[dict[str, Any], ...] = ()
    """VolumeMounts whose ``volume_id`` is the name of a volume."""
    ingresses: tuple[Ingress, ...] = ()
    depends_on: dict[str, str] = {}
    """Service → ``started``, ``healthy`` or ``completed``."""
    build: dict[str, Any] = {}
    """Directory ``context``, ``dockerfile`` and fields of the build's form; empty: the image is pulled."""
    build_secrets: dict[str, str] = {}
    """Of the build, by their ids, in base64. Not shown."""
    secrets: dict[str, str] = {}
    """Variables with the real values of the credentials in ``body``. Not shown, and not part of the fingerprint."""
    tags: dict[str, str] = {}
    """How the guest is set up."""
    watch: tuple[Rule, ...] = ()
    """What changed files do in ``compose watch``."""

    @property
    def content(self) -> list[Any]:
        """By which a changed service is noticed."""
        return [self.body, self.mounts, *([self.tags] if self.tags else [])]


class Stack(Struct, frozen=True):
    name: str
    services: tuple[Service, ...]
    volumes: tuple[Volume, ...] = ()
    warnings: tuple[str, ...] = ()
    """What in the file makes no difference here."""

    def ordered(self) -> list[Service]:
        """Services after those that they depend on. Raises ComposeError for a cycle or an unknown service."""
        found: list[Service] = []
        by_key = {service.key: service for service in self.services}
        visiting: list[str] = []

        def visit(key: str, needed_by: str) -> None:
            if key not in by_key:
                raise ComposeError(f"services.{needed_by}.depends_on: there is no service {key!r}")
            if key in visiting:
                raise ComposeError(f"services.{key}.depends_on: {' → '.join([*visiting, key])} is a cycle")
            if by_key[key] in found:
                return
            visiting.append(key)
            for other in by_key[key].depends_on:
                visit(other, key)
            visiting.pop()
            found.append(by_key[key])

        for service in self.services:
            visit(service.key, service.key)
        return found


def in_strings(tree: Any, change: Callable[[str], str]) -> Any:
    """``tree``, of dicts, lists and Tagged, with every string value changed."""
    if isinstance(tree, dict):
        return {key: in_strings(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [in_strings(value, change) for value in tree]
    if isinstance(tree, Tagged):
        return Tagged(in_strings(tree.value, change), tree.reset)
    return change(tree) if isinstance(tree, str) else tree


def fingerprint(value: Any) -> str:
    """Equal for equal content: by it a changed service is noticed."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]


def tags(stack: Stack, resource: str, service: str = "", content: Any = None) -> dict[str, str]:
    """By which a resource is found again."""
    found = {NAME_TAG: stack.name, RESOURCE_TAG: resource}
    if service:
        found[SERVICE_TAG] = service
    if content is not None:
        found[HASH_TAG] = fingerprint(content)
    return found
