"""Parses and formats image references and platforms. Pure; follows Docker's rules (contract §1.5).

alpine                          docker.io/library/alpine:latest
ghcr.io/acme/tool:1.2           ghcr.io/acme/tool:1.2
localhost:5000/x@sha256:…       localhost:5000/x@sha256:…   (a tag with a digest is dropped)
"""

from __future__ import annotations

import re

import msgspec

from hypeman import architecture
from hypeman.errors import InvalidRequest
from hypeman.logins import DEFAULT_REGISTRY

MAX_NAME = 255
"""Limit for registry plus repository, in characters."""

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN_PART = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[a-fA-F0-9]*:[a-fA-F0-9:]*\])(?::[0-9]{{1,5}})?"
_REFERENCE = re.compile(
    rf"(?:(?P<registry>{_DOMAIN})/)?(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>[a-z0-9]+:[a-f0-9]+))?"
)
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
_ARCHITECTURES = frozenset(each.name for each in architecture.ALL)
_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")


class Reference(msgspec.Struct, frozen=True):
    """A normalised reference; exactly one of ``tag`` and ``digest`` is set."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        end = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.registry}/{self.repository}{end}"

    @property
    def selector(self) -> str:
        """The digest or tag to request from a registry."""
        return self.digest or self.tag


class Platform(msgspec.Struct, frozen=True):
    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        end = f"/{self.variant}" if self.variant else ""
        return f"{self.os}/{self.architecture}{end}"


def parse_reference(text: str) -> Reference:
    """``text`` normalised. Raises InvalidRequest ``invalid_name``."""
    match = _REFERENCE.fullmatch(text) if len(text) <= 600 else None
    if match is None:
        hint = "; names are lower case" if text != text.lower() else ""
        raise InvalidRequest(f"{text[:100]!r} is not an image reference{hint}", code="invalid_name")
    registry, repository = match["registry"] or "", match["repository"]
    if registry and not _is_registry(registry):
        # "library/alpine": what looks like a host is the first part of a repository.
        repository, registry = f"{registry}/{repository}", ""
        if not re.fullmatch(rf"{_COMPONENT}(?:/{_COMPONENT})*", repository):
            raise InvalidRequest(f"{text[:100]!r} is not an image reference; names are lower case", code="invalid_name")
    if registry in ("", "index.docker.io"):
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    if len(registry) + 1 + len(repository) > MAX_NAME:
        raise InvalidRequest(f"the image's name is longer than {MAX_NAME} characters", code="invalid_name")
    digest = match["digest"] or ""
    if digest:
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest(f"{digest[:100]!r} is not a sha256 digest", code="invalid_name")
        return Reference(registry, repository, digest=digest)
    return Reference(registry, repository, tag=match["tag"] or "latest")


def _is_registry(part: str) -> bool:
    return "." in part or ":" in part or part == "localhost" or part != part.lower()


def host_platform() -> Platform:
    return Platform("linux", architecture.HOST.name)


def parse_platform(text: str) -> Platform:
    """The platform in ``text``. Raises InvalidRequest ``invalid_platform``."""
    parts = text.split("/")
    if not _PLATFORM.fullmatch(text) or parts[0] != "linux" or parts[1] not in _ARCHITECTURES:
        raise InvalidRequest(
            f"platform {text[:60]!r} must be linux/amd64 or linux/arm64, with an optional /variant",
            code="invalid_platform",
        )
    return Platform(*parts)
