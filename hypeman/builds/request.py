"""The fields of a build request, checked: ``parse_fields`` → what is stored, and what is only kept in memory. Pure.

Numbers that cannot be read are ignored, as the contract says; everything else that cannot be meant is refused.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TypeVar

import msgspec

from hypeman.errors import InvalidRequest
from hypeman.ids import Tags, check_tags
from hypeman.images.reference import parse_platform, parse_reference

MAX_FIELD = 1 << 20
"""Bytes of a field that is not the source."""
_MEMORY_MB = 2048
_CPUS = 2
_MAX_NAMES = 20
_MAX_ENTRIES = 100
_KEY = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*(/[a-z0-9]+([._-][a-z0-9]+)*)*")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,255}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CACHE = re.compile(r"type=(registry|inline)(,[a-z-]+=[^\s,\"]+)*")
_ATTEST = re.compile(r"(true|[a-z-]+=[^\s\"]+)")
_T = TypeVar("_T")


class BuildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be built, as it is stored. Nothing secret."""

    images: tuple[str, ...] = ()
    """Normalised names; empty: ``builds/<id>``."""
    dockerfile: bool = False
    """A Dockerfile was sent beside the context."""
    dockerfile_path: str = "Dockerfile"
    base_image_digest: str = ""
    cache_scope: str = ""
    global_cache_key: str = ""
    admin: bool = False
    timeout: int = 0
    """Seconds; 0: the server's default."""
    memory_mb: int = _MEMORY_MB
    cpus: int = _CPUS
    build_args: dict[str, str] = {}
    labels: dict[str, str] = {}
    target: str = ""
    platform: str = ""
    no_cache: bool = False
    pull: bool = False
    isolated: bool = False
    secrets: tuple[tuple[str, str], ...] = ()
    """Id, and the name of an environment variable or empty."""
    ssh: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    provenance: str = ""
    sbom: str = ""


class Borrowed(msgspec.Struct, frozen=True):
    """What a build gets from its caller and only keeps in memory."""

    secrets: dict[str, bytes] = {}
    ssh: dict[str, bytes] = {}
    registry_auth: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.secrets or self.ssh or self.registry_auth)

    def __repr__(self) -> str:
        return "Borrowed(…)" if self else "Borrowed()"


class Parsed(msgspec.Struct, frozen=True):
    spec: BuildSpec
    borrowed: Borrowed
    builder_id: str
    tags: Tags
    dockerfile: bytes
    from_server: tuple[str, ...]
    """Ids of secrets that the server must have itself."""


class BuildSecret(msgspec.Struct, frozen=True):
    id: str
    env_var: str = ""
    value: str | None = None
    value_base64: str | None = None

    def __repr__(self) -> str:
        return f"BuildSecret({self.id})"


def parse_fields(fields: Mapping[str, bytes]) -> Parsed:
    """Raises InvalidRequest, naming the field."""
    text = {name: _text(name, value) for name, value in fields.items() if name != "dockerfile"}
    names = [text["image_name"]] if text.get("image_name") else []
    names += _json("image_names", text, list[str], [])
    if len(names) > _MAX_NAMES:
        raise InvalidRequest(f"image_names: at most {_MAX_NAMES} names")
    secrets = _json("secrets", text, list[BuildSecret], [])
    ssh = _json("ssh", text, list[BuildSecret], [])
    _check_secrets("secrets", secrets)
    _check_secrets("ssh", ssh)
    if text.get("cache_scope", "").split("/")[0] == "global":
        raise InvalidRequest("cache_scope must not start with global; use global_cache_key")
    dockerfile = fields.get("dockerfile", b"")
    spec = BuildSpec(
        images=tuple(dict.fromkeys(_image(name) for name in names)),
        dockerfile=bool(dockerfile),
        dockerfile_path=_path(text.get("dockerfile_path") or "Dockerfile"),
        base_image_digest=_matching("base_image_digest", text, _DIGEST, "a sha256 digest"),
        cache_scope=_matching("cache_scope", text, _KEY, "a repository name"),
        global_cache_key=_matching("global_cache_key", text, _KEY, "a repository name"),
        admin=_flag("is_admin_build", text),
        timeout=_number("timeout_seconds", text, 0),
        memory_mb=_number("memory_mb", text, _MEMORY_MB),
        cpus=_number("cpus", text, _CPUS),
        build_args=_pairs("build_args", text, _VARIABLE),
        labels=_pairs("labels", text, None),
        target=_matching("target", text, _ID, "the name or number of a stage"),
        platform=_platforms(text.get("platform", "")),
        no_cache=_flag("no_cache", text),
        pull=_flag("pull", text),
        isolated=_network(text.get("network", "")),
        secrets=tuple((secret.id, secret.env_var) for secret in secrets),
        ssh=tuple(key.id for key in ssh),
        cache_from=_all_matching("cache_from", text, _CACHE, "type=registry,ref=…"),
        cache_to=_all_matching("cache_to", text, _CACHE, "type=registry,ref=… or type=inline"),
        provenance=_matching("provenance", text, _ATTEST, "true, mode=min or mode=max"),
        sbom=_matching("sbom", text, _ATTEST, "true or generator=…"),
    )
    auth = text.get("registry_auth", "")
    if auth:
        _json("registry_auth", text, dict[str, msgspec.Raw], {})
    given = {secret.id: found for secret in secrets if (found := _value("secrets", secret)) is not None}
    keys = {key.id: found for key in ssh if (found := _value("ssh", key)) is not None}
    if len(keys) != len(ssh):
        raise InvalidRequest("ssh: a key needs a value; the server has no keys and cannot reach your agent")
    return Parsed(
        spec=spec,
        borrowed=Borrowed(given, keys, auth.encode()),
        builder_id=text.get("builder_id", ""),
        tags=check_tags(_json("tags", text, dict[str, str], {})),
        dockerfile=dockerfile,
        from_server=tuple(secret.id for secret in secrets if secret.id not in given),
    )


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} must be UTF-8") from None
    if "\0" in text:
        raise InvalidRequest(f"{name} must not contain NUL")
    return text.strip()


def _json(name: str, text: Mapping[str, str], kind: type[_T], default: _T) -> _T:
    if not text.get(name):
        return default
    try:
        found = msgspec.json.decode(text[name], type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{name}: {error}") from None
    if len(found) > _MAX_ENTRIES:  # type: ignore[arg-type]
        raise InvalidRequest(f"{name}: at most {_MAX_ENTRIES} entries")
    return found


def _image(name: str) -> str:
    found = parse_reference(name)
    if found.digest:
        raise InvalidRequest(f"{name[:100]!r} is a digest; name the image with a tag", code="invalid_name")
    return str(found)


def _check_secrets(field: str, secrets: list[BuildSecret]) -> None:
    for secret in secrets:
        if not _ID.fullmatch(secret.id):
            raise InvalidRequest(f"{field}: id {secret.id[:80]!r} must be letters, digits, '_', '.' and '-'")
        if secret.env_var and not _VARIABLE.fullmatch(secret.env_var):
            raise InvalidRequest(f"{field}: env_var {secret.env_var[:80]!r} is not a valid variable name")
    if len({secret.id for secret in secrets}) != len(secrets):
        raise InvalidRequest(f"{field} contains an id twice")


def _value(field: str, secret: BuildSecret) -> bytes | None:
    if secret.value_base64 is not None:
        try:
            return base64.b64decode(secret.value_base64, validate=True)
        except binascii.Error:
            raise InvalidRequest(f"{field}: value_base64 of {secret.id} is not base64") from None
    return None if secret.value is None else secret.value.encode()


def _path(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or str(path) == ".":
        raise InvalidRequest(f"dockerfile_path {text[:100]!r} must be a relative path inside the context")
    return str(path)


def _matching(name: str, text: Mapping[str, str], pattern: re.Pattern[str], what: str) -> str:
    found = text.get(name, "")
    if found and (len(found) > 512 or not pattern.fullmatch(found)):
        raise InvalidRequest(f"{name} must be {what}, not {found[:100]!r}")
    return found


def _all_matching(name: str, text: Mapping[str, str], pattern: re.Pattern[str], what: str) -> tuple[str, ...]:
    return tuple(_matching(name, {name: one}, pattern, what) for one in _json(name, text, list[str], []))


def _flag(name: str, text: Mapping[str, str]) -> bool:
    found = text.get(name, "").lower()
    if found not in ("", "true", "1", "false", "0"):
        raise InvalidRequest(f"{name} must be true or false, not {found[:40]!r}")
    return found in ("true", "1")


def _number(name: str, text: Mapping[str, str], default: int) -> int:
    found = text.get(name, "")
    return int(found) if found.isascii() and found.isdigit() and len(found) < 10 and int(found) else default


def _pairs(name: str, text: Mapping[str, str], pattern: re.Pattern[str] | None) -> dict[str, str]:
    found = _json(name, text, dict[str, str], {})
    for key in found:
        if not key or "=" in key or "\0" in key or (pattern is not None and not pattern.fullmatch(key)):
            raise InvalidRequest(f"{name}: {key[:80]!r} is not a valid name")
    return found


def _platforms(text: str) -> str:
    return ",".join(str(parse_platform(one.strip())) for one in text.split(",")) if text else ""


def _network(text: str) -> bool:
    if text not in ("", "egress", "isolated"):
        raise InvalidRequest(f"network must be egress or isolated, not {text[:40]!r}")
    return text == "isolated"
