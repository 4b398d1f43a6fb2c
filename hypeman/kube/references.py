"""What a pod refers to, and what comes of it once it was read: environment and files. Pure."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from hypeman.kube.podspec import (
    ConfigMapFiles,
    Container,
    DownwardFiles,
    EnvSource,
    FieldRef,
    KeyToPath,
    PodSpec,
    Projection,
    Refusal,
    Remark,
    ResourceRef,
    SecretFiles,
    TokenFile,
    Volume,
)
from hypeman.kube.quantity import parse_quantity
from hypeman.kube.types import ConfigMap, Pod, Secret

DEFAULT_MODE = 0o644
MAX_FILES = 32 << 20
"""Bytes of a volume. An object has at most 1 MiB, but a volume may show each of them thousands of times."""


class Missing(Exception):
    """An object or key that the pod needs does not exist yet."""


class Needed(Struct, frozen=True):
    """Names of objects in the pod's namespace."""

    config_maps: frozenset[str] = frozenset()
    secrets: frozenset[str] = frozenset()
    tokens: frozenset[TokenFile] = frozenset()


class Sources(Struct, frozen=True):
    """What was read; an object that does not exist is absent."""

    config_maps: Mapping[str, ConfigMap] = {}
    secrets: Mapping[str, Secret] = {}
    tokens: Mapping[TokenFile, str] = {}


class Facts(Struct, frozen=True):
    """What a pod may ask about itself."""

    pod: Pod
    node: str
    address: str
    cpu: int
    memory: int
    """Of the VM, in bytes."""
    container: Container


class File(Struct, frozen=True, order=True):
    path: str
    """Relative to the mount."""
    content: bytes
    mode: int


# ── What is needed ──────────────────────────────────────────────────────────────────────────────


def needed(spec: PodSpec) -> Needed:
    container = spec.container
    config_maps, secrets, tokens = set[str](), set[str](), set[TokenFile]()
    for env in container.env:
        source = env.value_from or EnvSource()
        config_maps |= {ref.name for ref in (source.config_map_key_ref,) if ref}
        secrets |= {ref.name for ref in (source.secret_key_ref,) if ref}
    for each in container.env_from:
        config_maps |= {ref.name for ref in (each.config_map_ref,) if ref}
        secrets |= {ref.name for ref in (each.secret_ref,) if ref}
    for volume in mounted(spec):
        for part in projections(volume):
            config_maps |= {part.config_map.name} if part.config_map else set()
            secrets |= {secret_name(part.secret)} if part.secret else set()
            tokens |= {part.service_account_token} if part.service_account_token else set()
    return Needed(frozenset(config_maps), frozenset(secrets), frozenset(tokens))


def mounted(spec: PodSpec) -> Iterator[Volume]:
    names = {mount.name for mount in spec.container.volume_mounts}
    return (volume for volume in spec.volumes if volume.name in names)


def projections(volume: Volume) -> tuple[Projection, ...]:
    """What a volume of files is made of; nothing for other volumes."""
    if volume.projected is not None:
        return volume.projected.sources
    part = Projection(config_map=volume.config_map, secret=volume.secret, downward_api=volume.downward_api)
    return () if part == Projection() else (part,)


def secret_name(files: SecretFiles) -> str:
    return files.secret_name or files.name


# ── Environment ─────────────────────────────────────────────────────────────────────────────────


def environment(spec: PodSpec, facts: Facts, sources: Sources) -> dict[str, str]:
    """The variables of the container. Raises Missing, Refusal."""
    env: dict[str, str] = {}
    for each in spec.container.env_from:
        for name, value in _all_of(each.config_map_ref, each.secret_ref, sources):
            env[each.prefix + name] = value
    for var in spec.container.env:
        if var.value_from is None:
            env[var.name] = expand(var.value, env)
        elif (found := _from_source(var.value_from, facts, sources)) is not None:
            env[var.name] = found
    return env


def _all_of(config_map: object, secret: object, sources: Sources) -> Iterable[tuple[str, str]]:
    if config_map is not None:
        found = _config_map(config_map.name, config_map.optional, sources)  # type: ignore[attr-defined]
        return found.data.items() if found else ()
    if secret is not None:
        held = _secret(secret.name, secret.optional, sources)  # type: ignore[attr-defined]
        return ((key, _text(value)) for key, value in held.data.items()) if held else ()
    return ()


def _from_source(source: EnvSource, facts: Facts, sources: Sources) -> str | None:
    if (ref := source.config_map_key_ref) is not None:
        found = _config_map(ref.name, ref.optional, sources)
        value = found.data.get(ref.key) if found else None
        if value is None and not ref.optional:
            raise Missing(f"couldn't find key {ref.key} in ConfigMap {facts.pod.metadata.namespace}/{ref.name}")
        return value
    if (ref := source.secret_key_ref) is not None:
        held = _secret(ref.name, ref.optional, sources)
        encoded = held.data.get(ref.key) if held else None
        if encoded is None and not ref.optional:
            raise Missing(f"couldn't find key {ref.key} in Secret {facts.pod.metadata.namespace}/{ref.name}")
        return None if encoded is None else _text(encoded)
    if source.field_ref is not None:
        return field_value(source.field_ref, facts)
    return resource_value(source.resource_field_ref, facts) if source.resource_field_ref is not None else None


def expand(text: str, env: Mapping[str, str]) -> str:
    """``$(NAME)`` replaced by a variable that is known; ``$$`` is a dollar."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda found: "$" if found[1] == "$" else env.get(found[2], found[0]), text)


_LABEL = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


def field_value(ref: FieldRef, facts: Facts) -> str:
    """Raises Refusal for a field that is not known before the instance exists, or not at all."""
    about = facts.pod.metadata
    values = {
        "metadata.name": about.name,
        "metadata.namespace": about.namespace,
        "metadata.uid": about.uid,
        "metadata.labels": _lines(about.labels),
        "metadata.annotations": _lines(about.annotations),
        "spec.nodeName": facts.node,
        "spec.serviceAccountName": str(facts.pod.spec.get("serviceAccountName", "default")),
        "status.hostIP": facts.address,
        "status.hostIPs": facts.address,
    }
    if ref.field_path in values:
        return values[ref.field_path]
    if (found := _LABEL.fullmatch(ref.field_path)) is not None:
        return (about.labels if found[1] == "labels" else about.annotations).get(found[2], "")
    raise Refusal((Remark(f"fieldRef {ref.field_path}", "is not known when the guest is made"),))


def _lines(pairs: Mapping[str, str]) -> str:
    return "\n".join(f'{key}="{value}"' for key, value in sorted(pairs.items()))


def resource_value(ref: ResourceRef, facts: Facts) -> str:
    """What is declared counts; else the VM's size is its limit, and nothing is requested. Raises Refusal."""
    kind, _, name = ref.resource.partition(".")
    container = facts.container
    if ref.container_name not in ("", container.name):
        raise Refusal((Remark(f"resourceFieldRef {ref.resource}", f"there is no container {ref.container_name!r}"),))
    declared = container.resources.limits if kind == "limits" else container.resources.requests
    of_vm = {"cpu": facts.cpu, "memory": facts.memory} if kind == "limits" else {"cpu": 0, "memory": 0}
    amount = declared.get(name, of_vm.get(name))
    if amount is None:
        raise Refusal((Remark(f"resourceFieldRef {ref.resource}", "is not known when the guest is made"),))
    return str(math.ceil(parse_quantity(amount) / (parse_quantity(ref.divisor) or 1)))


# ── Files ───────────────────────────────────────────────────────────────────────────────────────


def files(volume: Volume, facts: Facts, sources: Sources) -> tuple[File, ...]:
    """The files of a volume of them. Raises Missing, Refusal."""
    default = volume.projected.default_mode if volume.projected is not None else None
    found: dict[str, File] = {}
    for part in projections(volume):
        for file in _files_of(part, default, facts, sources):
            found[file.path] = file
    if sum(len(file.content) for file in found.values()) > MAX_FILES:
        raise Refusal((Remark(f"spec.volumes {volume.name!r}", f"its files have more than {MAX_FILES} bytes"),))
    return tuple(sorted(found.values()))


def _files_of(part: Projection, default: int | None, facts: Facts, sources: Sources) -> Iterator[File]:
    if part.config_map is not None:
        yield from _config_map_files(part.config_map, default, sources)
    if part.secret is not None:
        yield from _secret_files(part.secret, default, sources)
    if part.downward_api is not None:
        yield from _downward_files(part.downward_api, default, facts)
    if part.service_account_token is not None:
        content = sources.tokens[part.service_account_token].encode()
        yield File(part.service_account_token.path, content, 0o600 if default is None else default)


def _config_map_files(files: ConfigMapFiles, default: int | None, sources: Sources) -> Iterator[File]:
    found = _config_map(files.name, files.optional, sources)
    if found is None:
        return
    data = {key: value.encode() for key, value in found.data.items()}
    data |= {key: _bytes(value) for key, value in found.binary_data.items()}
    yield from _chosen(data, files.items, _mode(files.default_mode, default), files.optional, files.name)


def _secret_files(files: SecretFiles, default: int | None, sources: Sources) -> Iterator[File]:
    found = _secret(secret_name(files), files.optional, sources)
    if found is None:
        return
    data = {key: _bytes(value) for key, value in found.data.items()}
    yield from _chosen(data, files.items, _mode(files.default_mode, default), files.optional, secret_name(files))


def _downward_files(files: DownwardFiles, default: int | None, facts: Facts) -> Iterator[File]:
    for item in files.items:
        value = field_value(item.field_ref, facts) if item.field_ref else ""
        if item.resource_field_ref:
            value = resource_value(item.resource_field_ref, facts)
        mode = _mode(files.default_mode, default) if item.mode is None else item.mode
        yield File(item.path, value.encode(), mode)


def _chosen(
    data: Mapping[str, bytes], items: tuple[KeyToPath, ...], mode: int, optional: bool, name: str
) -> Iterator[File]:
    if not items:
        yield from (File(key, content, mode) for key, content in data.items())
        return
    for item in items:
        if item.key in data:
            yield File(item.path, data[item.key], mode if item.mode is None else item.mode)
        elif not optional:
            raise Missing(f"{name} has no key {item.key}")


def _mode(own: int | None, default: int | None) -> int:
    return next((mode for mode in (own, default) if mode is not None), DEFAULT_MODE)


def _config_map(name: str, optional: bool, sources: Sources) -> ConfigMap | None:
    found = sources.config_maps.get(name)
    if found is None and not optional:
        raise Missing(f'configmap "{name}" not found')
    return found


def _secret(name: str, optional: bool, sources: Sources) -> Secret | None:
    found = sources.secrets.get(name)
    if found is None and not optional:
        raise Missing(f'secret "{name}" not found')
    return found


def _bytes(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise Missing("data that is not base64") from None


def _text(encoded: str) -> str:
    return _bytes(encoded).decode(errors="replace")
