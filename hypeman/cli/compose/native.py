"""The format of ``hypeman.compose.yaml`` (``version: 1``). Unknown keys are errors. Pure, but for ``${file:…}``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from hypeman.cli.compose.model import ComposeError, Ingress, Service, Stack, Volume, in_strings

_VARIABLE = re.compile(r"\$\{(env|file):([^${}]*)\}")
_MAX_DEPTH = 16


class _Base(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Volume(_Base, frozen=True):
    size_gb: int
    name: str | None = None


class _Resources(_Base, frozen=True):
    vcpus: int | None = None
    memory: str | None = None
    overlay_size: str | None = None
    hotplug_size: str | None = None
    disk_io_bps: str | None = None
    bandwidth_upload: str | None = None
    bandwidth_download: str | None = None


class _Restart(_Base, frozen=True):
    policy: str
    backoff: str | None = None
    max_attempts: int | None = None
    stable_after: str | None = None


class _Ingress(_Base, frozen=True):
    hostname: str
    target_port: int
    name: str | None = None
    host_port: int | None = None
    tls: bool | None = None
    tls_passthrough: bool | None = None
    redirect_http: bool | None = None


class _Mount(_Base, frozen=True):
    volume: str
    mount_path: str
    readonly: bool = False


class _Service(_Base, frozen=True):
    image: str | None = None
    dockerfile: str | None = None
    name: str | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: dict[str, str | int | float | bool] = {}
    volumes: tuple[str | _Mount, ...] = ()
    resources: _Resources = _Resources()
    restart: _Restart | None = None
    healthcheck: dict[str, Any] | None = None
    ingress: tuple[_Ingress, ...] = ()


class _File(_Base, frozen=True):
    version: Literal[1]
    name: str
    services: dict[str, _Service]
    volumes: dict[str, _Volume] = {}


def parse(tree: Any, directory: Path, environ: Mapping[str, str] = os.environ) -> Stack:
    """The stack of a decoded file. Raises ComposeError."""

    def read(path: str) -> str:
        try:
            return (directory / path).read_text().rstrip("\n")
        except (OSError, UnicodeError) as error:
            raise ComposeError(f"${{file:{path}}} cannot be read: {error}") from None

    filled = in_strings(tree, lambda text: interpolated(text, environ, read))
    try:
        file = msgspec.convert(filled, _File)
    except msgspec.ValidationError as error:
        raise ComposeError(str(error)) from None
    volumes = {
        key: Volume(key, volume.name or f"{file.name}-{key}", volume.size_gb) for key, volume in file.volumes.items()
    }
    services = tuple(_service(file.name, key, service, volumes) for key, service in file.services.items())
    return Stack(file.name, services, tuple(volumes.values()))


def interpolated(text: str, environ: Mapping[str, str], read: Callable[[str], str], depth: int = 0) -> str:
    """``text`` with ``${env:NAME}`` and ``${file:PATH}`` replaced, also in what they lead to. Raises ComposeError."""
    if not _VARIABLE.search(text):
        return text
    if depth >= _MAX_DEPTH:
        raise ComposeError(f"{text[:60]!r} is nested more than {_MAX_DEPTH} levels deep")

    def replace(found: re.Match[str]) -> str:
        if found[1] == "file":
            return read(found[2])
        if found[2] not in environ:
            raise ComposeError(f"${{env:{found[2]}}}: there is no such variable in the environment")
        return environ[found[2]]

    return interpolated(_VARIABLE.sub(replace, text), environ, read, depth + 1)


def _service(stack: str, key: str, service: _Service, volumes: dict[str, Volume]) -> Service:
    where = f"services.{key}"
    if service.dockerfile is not None:
        raise ComposeError(
            f"{where}.dockerfile: compose does not build; run hypeman build -t NAME, and name it as image"
        )
    if service.image is None:
        raise ComposeError(f"{where}.image is missing")
    name = service.name or f"{stack}-{key}"
    resources = service.resources
    network = {"bandwidth_upload": resources.bandwidth_upload, "bandwidth_download": resources.bandwidth_download}
    body = {
        "name": name,
        "image": service.image,
        "entrypoint": service.entrypoint,
        "cmd": service.cmd,
        "env": {name: _text(value) for name, value in service.env.items()},
        "vcpus": resources.vcpus,
        "size": resources.memory,
        "overlay_size": resources.overlay_size,
        "hotplug_size": resources.hotplug_size,
        "disk_io_bps": resources.disk_io_bps,
        "network": {key: value for key, value in network.items() if value is not None},
        "restart_policy": _present(service.restart),
        "health_check": service.healthcheck,
    }
    return Service(
        key=key,
        name=name,
        body={field: value for field, value in body.items() if value not in (None, {}, ())},
        mounts=tuple(_mount(f"{where}.volumes", mount, volumes) for mount in service.volumes),
        ingresses=tuple(_ingress(name, ingress) for ingress in service.ingress),
    )


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _present(value: Struct | None) -> dict[str, Any]:
    return {} if value is None else {key: one for key, one in msgspec.structs.asdict(value).items() if one is not None}


def _mount(where: str, mount: str | _Mount, volumes: dict[str, Volume]) -> dict[str, Any]:
    if isinstance(mount, str):
        key, _, rest = mount.partition(":")
        path, _, mode = rest.partition(":")
        if not path.startswith("/") or mode not in ("", "ro", "rw"):
            raise ComposeError(f"{where}: {mount!r} must read KEY:/PATH[:ro|rw]")
        mount = _Mount(key, path, mode == "ro")
    if mount.volume not in volumes:
        raise ComposeError(f"{where}: there is no volume {mount.volume!r}")
    body: dict[str, Any] = {"volume_id": volumes[mount.volume].name, "mount_path": mount.mount_path}
    return {**body, **({"readonly": True} if mount.readonly else {})}


def _ingress(instance: str, ingress: _Ingress) -> Ingress:
    name = ingress.name or ingress.hostname.replace(".", "-").replace("{", "").replace("}", "").lower()
    port = ingress.host_port or (443 if ingress.tls or ingress.tls_passthrough else None)
    match = {"hostname": ingress.hostname, **({"port": port} if port else {})}
    rule: dict[str, Any] = {"match": match, "target": {"instance": instance, "port": ingress.target_port}}
    for field in ("tls", "tls_passthrough", "redirect_http"):
        if (value := getattr(ingress, field)) is not None:
            rule[field] = value
    return Ingress(name, {"name": name, "rules": [rule]})
